"""The conversion itself: recognise, rename, write, verify, publish."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers

from fat5.model import copy_runtime_files
from fat5convert.errors import ConvertError, DifferenceError, some
from fat5convert.formats import TensorInfo
from fat5convert.hashing import hash_file
from fat5convert.journal import Journal
from fat5convert.json_files import write_json
from fat5convert.options import DEFAULT_SHARD_SIZE
from fat5convert.precision import POLICIES, Form, is_bfloat16_exact, kept_dtype
from fat5convert.recognise import Recognised, recognise
from fat5convert.rescaling import Rescaling, choose_rescaling
from fat5convert.sentence_modules import carry_modules
from fat5convert.side_files import check_side_files, write_config, write_side_files
from fat5convert.source import SETTINGS_FILES, Checkpoint, locate
from fat5convert.staging import check_apart, check_space, check_target, holds_model, staged
from fat5convert.verify import verify_written
from fat5convert.writer import Advance, Item, write_weights

CONVERSION_SCHEMA = "fat5-conversion/2"


@dataclass(frozen=True)
class Plan:
    """What a conversion will write."""

    checkpoint: Checkpoint
    recognised: Recognised
    dtype: str  # the policy; `auto` is already decided
    rescaling: Rescaling
    forms: dict[str, Form]  # by FAT5 name

    @property
    def outputs(self) -> dict[str, TensorInfo]:
        """Description of every tensor in OUT."""
        return {pair.fat5: TensorInfo(self.forms[pair.fat5].dtype, pair.shape) for pair in self.recognised.pairs}

    @property
    def config(self) -> dict[str, Any]:
        """Fields of FlashT5Config in OUT."""
        return self.rescaling.adapt(self.recognised.config)

    @property
    def nbytes(self) -> int:
        """Bytes of weights in OUT."""
        return sum(info.nbytes for info in self.outputs.values())

    @property
    def parameters(self) -> int:
        """Number of weights in OUT."""
        return sum(info.numel for info in self.outputs.values())


@dataclass(frozen=True)
class Report:
    """What a conversion did: the contents of conversion.json and, if verified, of parity.json."""

    plan: Plan
    conversion: dict[str, Any]
    parity: dict[str, Any] | None


def plan_conversion(model: str, *, dtype: str = "keep", revision: str | None = None, config: str | None = None) -> Plan:
    """Find and understand MODEL without writing anything.

    Arguments as in `convert`. `auto` reads the weights up to the first that is no bfloat16 value, `float16` runs the
    model on a probe.

    Raises:
        ConvertError: MODEL cannot be found, read or understood, or cannot be made safe for float16.
    """
    checkpoint = Checkpoint(locate(model, revision), config)
    recognised = recognise(checkpoint)
    check_side_files(checkpoint)
    if dtype == "auto":
        exact = all(is_bfloat16_exact(checkpoint.chunks(pair.source)) for pair in recognised.pairs)
        dtype = "bfloat16" if exact else "keep"
    rescaling = choose_rescaling(checkpoint, recognised) if dtype == "float16" else Rescaling()
    forms = {
        pair.fat5: Form(
            POLICIES[dtype] or kept_dtype(checkpoint.tensors[pair.source].dtype),
            rescaling.exponent(pair.t5, recognised.layout),
        )
        for pair in recognised.pairs
    }
    return Plan(checkpoint, recognised, dtype, rescaling, forms)


def convert(
    model: str,
    out: str | Path,
    *,
    dtype: str = "keep",
    revision: str | None = None,
    config: str | None = None,
    shard_size: int = DEFAULT_SHARD_SIZE,
    verify: bool = True,
    overwrite: bool = False,
    progress: Callable[[Plan], Advance] | None = None,
) -> Report:
    """Convert MODEL into the FAT5 repo OUT, which appears complete (and verified) or not at all.

    Args:
        model: local folder or single weight file, or Hub id.
        out: folder to make.
        dtype: `keep` (bit-exact), `auto` (bfloat16 if every value is one already, else keep), `bfloat16` (round to
            nearest even), `float32` (exact), or `float16` (rescaled by powers of two where its range is too small).
        revision: branch, tag or commit, for a Hub id.
        config: for a single file, a name in `known_configs.KNOWN_CONFIGS` or a JSON file.
        shard_size: most bytes per weight file.
        verify: compare with stock `transformers` before OUT appears.
        overwrite: replace an OUT that is an earlier conversion.
        progress: given the plan, returns a function to call with every count of bytes written.

    Raises:
        ConvertError: bad input, or OUT cannot be written.
        DifferenceError: the converted model does not compute what the source computes.
    """
    out = Path(out)
    check_target(out, overwrite, holds_model("flash_t5"))
    plan = plan_conversion(model, dtype=dtype, revision=revision, config=config)
    location = plan.checkpoint.location
    check_apart(out, location.folder / location.file if location.file else location.folder)
    check_space(out, plan.nbytes)
    with staged(out, overwrite, holds_model("flash_t5"), resume=True) as folder:
        conversion = _write(plan, folder, shard_size, progress(plan) if progress else lambda count: None, verify)
        parity = None
        if verify:
            parity = verify_written(folder, plan.checkpoint, plan.recognised, conversion)
            if parity["result"] != "same":
                raise DifferenceError(f"{out} was not written: {some(parity['differences'], between='; ')}")
            write_json(folder / "parity.json", parity)
    return Report(plan, conversion, parity)


def _write(plan: Plan, folder: Path, shard_size: int, advance: Advance, verify: bool) -> dict[str, Any]:
    checkpoint, recognised = plan.checkpoint, plan.recognised
    items = [
        Item(pair.fat5, checkpoint, pair.source, checkpoint.tensors[pair.source], plan.forms[pair.fat5])
        for pair in recognised.pairs
    ]
    journal = Journal(folder, _fingerprint(plan, shard_size))
    tensors = write_weights(folder, items, shard_size, advance, journal, cached=verify)
    journal.close()
    rounding = {name: facts.pop("rounding") for name, facts in tensors.items() if "rounding" in facts}
    overflows = [name for name, errors in rounding.items() if errors["overflows"]]
    if overflows and plan.dtype == "float16":
        raise ConvertError(f"float16 cannot hold the values of {', '.join(overflows)}. Use bfloat16.")

    keep = plan.dtype == "keep"
    write_config(folder, plan.config, recognised.layout, plan.outputs, checkpoint.config, keep)
    write_side_files(folder, checkpoint, recognised)
    modules = carry_modules(checkpoint.folder, folder) if checkpoint.location.file is None else {}
    copy_runtime_files(folder)
    conversion = {
        "schema": CONVERSION_SCHEMA,
        "source": {
            "name": checkpoint.location.name,
            "revision": checkpoint.location.revision,
            "files": checkpoint.weight_files,
        },
        "model_type": recognised.model_type,
        "decisions": recognised.decisions(),
        "dtype": plan.dtype,
        "rescaling": plan.rescaling.as_dict(),
        "tensors": {pair.fat5: tensors[pair.fat5] for pair in recognised.pairs},
        "files": {path.name: hash_file(path) for path in sorted(folder.iterdir()) if path.name in SETTINGS_FILES},
        "modules": modules,
        "leftovers": recognised.leftovers,
        "rounding": dict(sorted(rounding.items(), key=lambda item: -item[1]["max_relative"])),
        # Where its author kept it is nobody's business.
        "source_config": {key: value for key, value in checkpoint.config.items() if key != "_name_or_path"},
        "versions": {
            "fat5": _own_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    write_json(folder / "conversion.json", conversion)
    return conversion


def _own_version() -> str:
    """Of the package, or that there is none: a checkout on the path, not installed."""
    try:
        return version("fat5")
    except PackageNotFoundError:
        return "not installed"


def _fingerprint(plan: Plan, shard_size: int) -> Any:
    """Everything that decides the bytes of the shards: a killed conversion goes on only where all of it is the same."""
    checkpoint = plan.checkpoint
    stats = [(name, (checkpoint.folder / name).stat()) for name in checkpoint.weight_files]
    return {
        "schema": CONVERSION_SCHEMA,
        "fat5": _own_version(),
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "folder": str(checkpoint.folder.resolve()),
        "pairs": [[pair.source, pair.fat5, list(pair.shape)] for pair in plan.recognised.pairs],
        "forms": [[str(form.dtype), form.exponent] for form in plan.forms.values()],
        "shard_size": shard_size,
    }
