"""The command `fat5convert`: each function parses, calls and prints.

Exit codes: 0 done, 1 the work failed, 2 wrong usage, 3 verification found a difference. What is heavy to import is
imported when a command runs, so that --help is quick.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from fat5convert.console import one_message, size
from fat5convert.errors import ConvertError, DifferenceError, some
from fat5convert.families import family_table
from fat5convert.interruption import importing
from fat5convert.json_files import write_json
from fat5convert.options import DEFAULT_SHARD_SIZE, DTYPES
from fat5convert.publish.command import push

if TYPE_CHECKING:
    from fat5convert.convert import Plan
    from fat5convert.writer import Advance

_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


_GROUP_OPTIONS = ("--help", "-h", "--version", "--list-families")


class DefaultCommand(click.Group):
    """A group where `fat5convert MODEL OUT` means `fat5convert convert MODEL OUT`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `convert` in front unless a command, or an option of the group itself, comes first."""
        if args and args[0] not in self.commands and args[0] not in _GROUP_OPTIONS:
            args = ["convert", *args]
        return super().parse_args(ctx, args)


class Bytes(click.ParamType[int]):
    """A size such as 2GB, 500MB or 4GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse it; a plain number is bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip())
        unit = _UNITS.get(match.group(2).upper()) if match else None
        if match is None or unit is None or float(match.group(1)) * unit < 1:
            self.fail(f"{value!r} is no size; write for example 2GB", param, ctx)
        return int(float(match.group(1)) * unit)


def _list_families(ctx: click.Context, option: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        click.echo(family_table())
        ctx.exit()


_CONFIG = click.option(
    "--config", metavar="NAME_OR_FILE", help="what a single file is, such as t5-v1_1-xxl, or a config.json"
)
_QUIET = click.option("--quiet", is_flag=True, help="print nothing but errors")


_DTYPE_HELP = "keep is bit-exact; auto is bfloat16 if that is exact, else keep; float16 is rescaled to fit"


@click.group(
    cls=DefaultCommand,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 the work failed, 2 wrong usage, 3 verification found a difference, 130 and 143 "
    "interrupted (Ctrl-C, SIGTERM).",
)
@click.version_option(package_name="fat5")
@click.option(
    "--list-families", is_flag=True, expose_value=False, is_eager=True, callback=_list_families, help="what converts"
)
def main() -> None:
    """Convert a T5 checkpoint into a FAT5 model that computes the same, and back.

    MODEL is a folder, a single weight file or a Hub id; `fat5convert MODEL OUT` is short for
    `fat5convert convert MODEL OUT`.

    \b
    Examples:
      fat5convert google/flan-t5-small flan-fat5/
      fat5convert t5xxl_fp16.safetensors t5xxl-fat5/ --config t5-v1_1-xxl
      fat5convert export flan-fat5/ flan-t5-again/
    """  # noqa: D301 (click's \b keeps the lines apart)


@main.command()
@click.argument("model")
@click.argument("out", type=click.Path())
@click.option("--dtype", type=click.Choice(DTYPES), default="keep", show_default=True, help=_DTYPE_HELP)
@click.option("--revision", help="branch, tag or commit of a Hub model")
@_CONFIG
@click.option("--shard-size", type=Bytes(), default=DEFAULT_SHARD_SIZE, help="most bytes per file  [default: 2GB]")
@click.option("--verify/--no-verify", default=True, show_default=True, help="compare with stock transformers")
@click.option("--overwrite", is_flag=True, help="replace OUT if it is an earlier conversion")
@click.option("--dry-run", is_flag=True, help="say what would be done, write nothing")
@_QUIET
def convert(
    model: str,
    out: str,
    dtype: str,
    revision: str | None,
    config: str | None,
    shard_size: int,
    verify: bool,
    overwrite: bool,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Convert MODEL into the folder OUT (the default command)."""
    with importing():
        from fat5convert.convert import convert as convert_model
        from fat5convert.convert import plan_conversion

    start = time.monotonic()
    with one_message():
        if dry_run:
            plan = plan_conversion(model, dtype=dtype, revision=revision, config=config)
            _say_plan(plan, {})
            click.echo(f"would write {size(plan.nbytes)} to {out} (dry run: nothing was written)")
            return
        report = convert_model(
            model,
            out,
            dtype=dtype,
            revision=revision,
            config=config,
            shard_size=shard_size,
            verify=verify,
            overwrite=overwrite,
            progress=None if quiet else lambda plan: _bar(plan.nbytes, "converting"),
        )
    _warn_of_overflow(report.conversion["rounding"])
    if quiet:
        return
    _say_plan(report.plan, report.conversion["rounding"])
    click.echo(_parity_line(report.parity) if report.parity else "not verified (--no-verify)")
    click.secho(f"{out}: {size(report.plan.nbytes)} in {time.monotonic() - start:.1f} s", fg="green")


@main.command()
@click.argument("model")
@click.option("--revision", help="branch, tag or commit of a Hub model")
@_CONFIG
@click.option("--json", "as_json", is_flag=True, help="for scripts")
def inspect(model: str, revision: str | None, config: str | None, as_json: bool) -> None:
    """Say what MODEL is, and what converting it would do."""
    with importing():
        from fat5convert.inspection import inspect_model

    with one_message():
        facts = inspect_model(model, revision, config)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    click.secho(f"{facts['source']}: {facts['family']}", bold=True)
    for name, decision in facts["decisions"].items():
        click.echo(f"  {name}: {decision['value']} ({decision['reason']})")
    click.echo("  sizes: " + ", ".join(f"{name} {value}" for name, value in facts["sizes"].items()))
    dtypes = ", ".join(f"{name} {count:,}" for name, count in facts["dtypes"].items())
    click.echo(f"  parameters: {facts['parameters']:,} in {facts['tensors']} tensors ({dtypes})")
    memory = ", ".join(f"{name} {size(count)}" for name, count in facts["memory"].items())
    click.echo(f"  memory of the weights: {memory}")
    for name, count in facts["not_finite"].items():
        click.secho(f"  not finite: {count} value(s) of {name}", fg="yellow")
    for name, reason in facts["leftovers"].items():
        click.echo(f"  left behind: {name} ({reason})")


@main.command()
@click.argument("out", type=click.Path())
@click.option("--against", metavar="SOURCE", help="folder or Hub id that OUT was converted from")
@click.option("--revision", help="branch, tag or commit of a Hub source")
@_CONFIG
@_QUIET
def verify(out: str, against: str | None, revision: str | None, config: str | None, quiet: bool) -> None:
    """Check a converted folder: its hashes, and with --against also what it computes."""
    with importing():
        from fat5convert.verify import verify as verify_model

    with one_message():
        parity = verify_model(out, against, revision, config)
        if parity["result"] != "same":
            raise DifferenceError(f"{out} differs: " + some(parity["differences"], between="; "))
        if against:
            _record(out, parity)
    if quiet:
        return
    click.secho(_parity_line(parity), fg="green")
    if not against:
        click.echo("checked against the recorded hashes; give --against SOURCE to compare what the models compute")


@main.command()
@click.argument("out", type=click.Path())
@click.argument("t5_dir", type=click.Path())
@click.option("--transformers", type=click.Choice(["4", "5"]), help="whose words config.json uses  [default: both]")
@click.option("--overwrite", is_flag=True, help="replace T5_DIR if it holds a T5")
@_QUIET
def export(out: str, t5_dir: str, transformers: str | None, overwrite: bool, quiet: bool) -> None:
    """Write the FAT5 folder OUT as a stock T5 folder T5_DIR."""
    with importing():
        from fat5convert.export import export as export_model

    with one_message():
        exported = export_model(
            out,
            t5_dir,
            transformers=int(transformers) if transformers else None,
            overwrite=overwrite,
            progress=None if quiet else lambda nbytes: _bar(nbytes, "exporting"),
        )
    if quiet:
        return
    for name, reason in exported.not_restored.items():
        click.echo(f"not restored: {name} ({reason})")
    for warning in exported.warnings:
        click.secho(f"note: {warning}", fg="yellow")
    written = f"{exported.tensors} tensors, {size(exported.nbytes)}"
    click.secho(f"{t5_dir}: stock {exported.model_type}, {written}", fg="green")


main.add_command(push)


def _record(out: str, parity: dict[str, Any]) -> None:
    try:
        write_json(Path(out) / "parity.json", parity)
    except OSError as error:
        raise ConvertError(f"{out}/parity.json: cannot be written ({error.strerror})") from error


def _bar(total: int, title: str) -> Advance:
    bar = tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=None, leave=False)

    def advance(count: int) -> None:
        bar.update(count)
        if bar.n >= total:
            bar.close()

    return advance


def _say_plan(plan: Plan, rounding: dict[str, dict[str, float]]) -> None:
    """The first two lines of the summary: what it was, and what became of its tensors."""
    from fat5convert.rescaling import Rescaling

    recognised, rescaling = plan.recognised, plan.rescaling
    head = f", head {'tied' if recognised.layout.tied else 'untied'}, {'scaled' if recognised.scaled else 'unscaled'}"
    if not recognised.layout.is_language_model:
        head = ""
    click.echo(f"{plan.checkpoint.location.label}: {recognised.title}, {plan.parameters:,} parameters{head}")
    line = f"{len(plan.outputs)} tensors mapped, dtype {plan.dtype}"
    if rescaling != Rescaling():
        line += f", rescaled by 2^-{rescaling.residual} and within {len(rescaling.inner)} feed-forward layer(s)"
    if recognised.leftovers:
        line += f", left behind: {', '.join(recognised.leftovers)}"
    lossy = {name: error for name, error in rounding.items() if error["rms_relative"] > 0}
    if lossy:
        name, error = next(iter(lossy.items()))
        rms = max(item["rms_relative"] for item in lossy.values())
        line += f"; relative rounding errors up to {error['max_relative']:.2e} ({name}), RMS {rms:.2e}"
    click.echo(line)


def _warn_of_overflow(rounding: dict[str, dict[str, float]]) -> None:
    overflows = [name for name, error in rounding.items() if error["overflows"]]
    if overflows:
        click.echo(f"overflow to infinity in {len(overflows)} tensor(s): {', '.join(overflows)}", err=True)


def _parity_line(parity: dict[str, Any]) -> str:
    tensors, models = parity["tensors"], parity["models"]
    line = f"same: {tensors['compared']} tensors ({tensors['identical']} bit-identical, {tensors['rounded']} rounded)"
    if models is None:
        return line
    key = "encoder_error" if models["compared"] == "encoder states" else "logits_error"
    errors = ", ".join(f"{m['attn_implementation']} {m[key]:.1e}" for m in models["implementations"])
    greedy = ", greedy tokens identical" if models["compared"] == "logits" else ""
    rounding = models["rounding"]
    lost = f"; rounding moves {models['compared']} by {rounding[key]:.1e}" if rounding else ""
    return f"{line}, {models['compared']} within {errors} of stock{greedy}{lost}"
