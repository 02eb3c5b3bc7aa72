"""The conversion itself: recognise, rename, write, verify, publish."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

from fat5.model import AUTO_MAP, FlashT5Config, copy_runtime_files
from fat5convert.errors import ConvertError, DifferenceError
from fat5convert.families import FAMILIES, Recognised, recognise
from fat5convert.formats import TensorInfo
from fat5convert.precision import CONVERTIBLE, POLICIES, RoundingError, apply, rounding_error, short_name
from fat5convert.source import SETTINGS_FILES, Checkpoint, locate, read_json, write_json
from fat5convert.verify import verify_checkpoint
from fat5convert.writer import (
    Advance,
    Item,
    check_space,
    check_target,
    hash_file,
    hash_tensor,
    holds_model,
    staged,
    write_weights,
)

CONVERSION_SCHEMA = "fat5-conversion/1"
DEFAULT_SHARD_SIZE = 2_000_000_000

# Configs written by early releases of transformers also hold what is for generation.
_GENERATION_KEYS = set(GenerationConfig().to_dict()) - {"transformers_version"}


@dataclass(frozen=True)
class Plan:
    """What a conversion will write."""

    checkpoint: Checkpoint
    recognised: Recognised
    dtype: str
    outputs: dict[str, TensorInfo]

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


def plan_conversion(model: str, *, dtype: str = "keep", revision: str | None = None) -> Plan:
    """Find and understand MODEL without writing anything.

    Raises:
        ConvertError: MODEL cannot be found, read or understood.
    """
    checkpoint = Checkpoint(locate(model, revision))
    recognised = recognise(checkpoint)
    target = POLICIES[dtype]
    outputs = {
        pair.fat5: TensorInfo(target or checkpoint.tensors[pair.t5].dtype, pair.shape) for pair in recognised.pairs
    }
    return Plan(checkpoint, recognised, dtype, outputs)


def convert(
    model: str,
    out: str | Path,
    *,
    dtype: str = "keep",
    revision: str | None = None,
    shard_size: int = DEFAULT_SHARD_SIZE,
    verify: bool = True,
    overwrite: bool = False,
    progress: Callable[[Plan], Advance] | None = None,
) -> Report:
    """Convert MODEL into the FAT5 repo OUT, which appears complete (and verified) or not at all.

    Args:
        model: local folder, or Hub id.
        out: folder to make.
        dtype: `keep` (bit-exact), `bfloat16` (round to nearest even) or `float32` (exact).
        revision: branch, tag or commit, for a Hub id.
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
    plan = plan_conversion(model, dtype=dtype, revision=revision)
    _check_apart(plan.checkpoint.folder, out)
    check_space(out, plan.nbytes)
    with staged(out, overwrite, holds_model("flash_t5")) as folder:
        conversion = _write(plan, folder, shard_size, progress(plan) if progress else lambda count: None)
        parity = None
        if verify:
            parity = verify_checkpoint(folder, plan.checkpoint)
            if parity["result"] != "same":
                raise DifferenceError(f"{out} was not written: {'; '.join(parity['differences'])}")
            write_json(folder / "parity.json", parity)
    return Report(plan, conversion, parity)


def _write(plan: Plan, folder: Path, shard_size: int, advance: Advance) -> dict[str, Any]:
    checkpoint, recognised = plan.checkpoint, plan.recognised
    tensors: dict[str, dict[str, Any]] = {}
    errors: dict[str, RoundingError] = {}

    def producer(t5: str, fat5_name: str) -> Callable[[], torch.Tensor]:
        def produce() -> torch.Tensor:
            before = checkpoint.load(t5)
            after = apply(before, plan.dtype)
            tensors[fat5_name] = {"source": t5, "source_dtype": short_name(before.dtype)}
            if after.dtype != before.dtype:
                tensors[fat5_name]["source_sha256"] = hash_tensor(before)
                errors[fat5_name] = rounding_error(before, after)
            return after

        return produce

    items = [Item(pair.fat5, plan.outputs[pair.fat5], producer(pair.t5, pair.fat5)) for pair in recognised.pairs]
    hashes = write_weights(folder, items, shard_size, advance)
    for name, entry in tensors.items():
        entry["dtype"] = short_name(plan.outputs[name].dtype)
        entry["sha256"] = hashes[name]
        entry.setdefault("source_sha256", hashes[name])

    _write_config(plan, folder)
    _write_side_files(plan, folder)
    copy_runtime_files(folder)
    worst_first = sorted(errors.items(), key=lambda item: -item[1].max_relative)
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
        "tensors": {pair.fat5: tensors[pair.fat5] for pair in recognised.pairs},
        "files": {path.name: hash_file(path) for path in sorted(folder.iterdir()) if path.name in SETTINGS_FILES},
        "leftovers": recognised.leftovers,
        "rounding": {name: error.as_dict() for name, error in worst_first},
        # Where its author kept it is nobody's business.
        "source_config": {key: value for key, value in checkpoint.config.items() if key != "_name_or_path"},
        "versions": {
            "fat5": version("fat5"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    write_json(folder / "conversion.json", conversion)
    return conversion


def _write_config(plan: Plan, folder: Path) -> None:
    config = FlashT5Config(**plan.recognised.config, architectures=["FlashT5ForConditionalGeneration"])
    fields = (
        config.to_diff_dict()
        | plan.recognised.config
        | {
            "auto_map": AUTO_MAP,
            "dtype": _loading_dtype(plan),
        }
    )
    write_json(folder / "config.json", dict(sorted(fields.items())))


def _loading_dtype(plan: Plan) -> str:
    """The dtype that `from_pretrained` gives the model: what the source states, else the widest in the file."""
    raw = plan.checkpoint.config
    stated = raw.get("dtype", raw.get("torch_dtype"))
    if plan.dtype == "keep" and stated in {short_name(dtype) for dtype in CONVERTIBLE}:
        return stated
    return short_name(max((info.dtype for info in plan.outputs.values()), key=lambda dtype: torch.finfo(dtype).bits))


def _write_side_files(plan: Plan, folder: Path) -> None:
    """Carry the tokenizer and generation config over, and add what only the stock model type implied."""
    raw, files = plan.checkpoint.config, plan.checkpoint.side_files()
    for path in files:
        shutil.copyfile(path, folder / path.name)
    names = {path.name for path in files}
    if "generation_config.json" not in names:
        settings = {key: value for key, value in raw.items() if key in _GENERATION_KEYS and value is not None}
        for key in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
            settings.setdefault(key, plan.recognised.config[key])
        write_json(folder / "generation_config.json", settings)
    if names - {"generation_config.json"}:
        # AutoTokenizer finds the class by model type when this file does not name it; flash_t5 has none.
        path = folder / "tokenizer_config.json"
        settings = read_json(path) if path.is_file() else {}
        if "tokenizer_class" not in settings:
            stated = raw.get("tokenizer_class") or FAMILIES[plan.recognised.model_type].tokenizer_class
            write_json(path, settings | {"tokenizer_class": stated})


def _check_apart(source: Path, out: Path) -> None:
    source, out = source.resolve(), out.absolute().parent.resolve() / out.name
    if source == out or out in source.parents or source in out.parents:
        raise ConvertError(f"{out}: is, holds or lies in the source; choose another folder")
