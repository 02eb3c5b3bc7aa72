"""Write safetensors shards, a few million values in memory at a time, hashing them as they pass."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fat5convert.direct_file import DirectFile
from fat5convert.errors import ConvertError
from fat5convert.formats import SAFETENSORS_DTYPES, TensorInfo
from fat5convert.hashing import Chunked, tensor_bytes
from fat5convert.journal import Journal
from fat5convert.json_files import write_json
from fat5convert.precision import ErrorMeter, Form, short_name
from fat5convert.workers import Task, one_thread_each, share_out

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Item:
    """A tensor to be written: its name, where its values are, their description there, and what becomes of them."""

    name: str
    source: Chunked
    source_name: str
    source_info: TensorInfo
    form: Form

    @property
    def info(self) -> TensorInfo:
        """What is written."""
        return TensorInfo(self.form.dtype, self.source_info.shape)


def write_weights(
    folder: Path,
    items: Sequence[Item],
    shard_size: int,
    advance: Advance,
    journal: Journal | None = None,
    cached: bool = True,
) -> dict[str, dict[str, Any]]:
    """Write `model.safetensors`, or numbered shards with their index when one file would exceed `shard_size`.

    Args:
        folder: existing folder to write into.
        items: the tensors, in order.
        shard_size: most bytes of data per file (a larger tensor gets a file of its own).
        advance: called with every count of bytes on their way to the disk.
        journal: where finished shards are noted, and may be found; those are not written again.
        cached: leave the files in the page cache, for whoever reads them next.

    Returns:
        For every tensor: `source`, `source_dtype`, `dtype`, `exponent` where it is not 0, `source_sha256` and
        `sha256`, computed as the values pass, and `rounding` where the form changed them.
    """
    shards = _split(items, shard_size)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    facts: dict[str, dict[str, Any]] = {}
    for name, shard in zip(names, shards, strict=True):
        found = journal.finished(folder / name, [item.name for item in shard]) if journal else None
        if found is None:
            found = _write_shard(folder / name, shard, advance, cached)
            if journal:
                journal.record(folder / name, found)
        else:
            advance(sum(item.info.nbytes for item in shard))
        facts |= found
    if len(shards) > 1:
        total = sum(item.info.nbytes for item in items)
        weight_map = {item.name: name for name, shard in zip(names, shards, strict=True) for item in shard}
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
    return facts


def _split(items: Sequence[Item], shard_size: int) -> list[list[Item]]:
    shards: list[list[Item]] = [[]]
    filled = 0
    for item in items:
        if shards[-1] and filled + item.info.nbytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += item.info.nbytes
    return shards


def _write_shard(path: Path, items: Sequence[Item], advance: Advance, cached: bool) -> dict[str, dict[str, Any]]:
    # Wide dtypes first: then every tensor of the file is aligned to its own size.
    items = sorted(items, key=lambda item: -item.info.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, offset = [], 0
    for item in items:
        offsets.append(offset)
        end = offset + item.info.nbytes
        dtype = _DTYPE_NAMES[item.info.dtype]
        header[item.name] = {"dtype": dtype, "shape": list(item.info.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    with closing(DirectFile(path, cached)) as file, one_thread_each() as threads:
        with file.region(0) as region:
            region.write(memoryview(head))
        starts = [len(head) + start for start in offsets]
        passed = [_Passing(item) for item in items]
        share_out((p.write(file, start) for p, start in zip(passed, starts, strict=True)), threads, advance)
        file.finish()
    return {tensor.item.name: tensor.facts() for tensor in passed}


class _Passing:
    """One tensor on its way from source to file: rounded, hashed and measured as it passes."""

    def __init__(self, item: Item) -> None:
        self.item = item
        self._changes = item.form != Form(item.source_info.dtype)
        self._source_digest, self._digest, self._meter = hashlib.sha256(), hashlib.sha256(), ErrorMeter()

    def write(self, file: DirectFile, start: int) -> Task:
        """Write it from an offset on, chunk by chunk; gives the bytes of each."""
        item, count = self.item, 0
        with file.region(start) as region:
            for before in item.source.chunks(item.source_name):
                count += before.numel()
                if before.dtype != item.source_info.dtype or count > item.source_info.numel:
                    raise self._changed()
                after = item.form.apply(before) if self._changes else before
                data = tensor_bytes(after)
                region.write(data)
                self._digest.update(data)
                if self._changes:
                    self._source_digest.update(tensor_bytes(before))
                    self._meter.add(before, item.form.undo(after))
                yield len(data)
        if count != item.source_info.numel:
            raise self._changed()

    def _changed(self) -> ConvertError:
        return ConvertError(f"tensor {self.item.source_name} changed while it was being converted")

    def facts(self) -> dict[str, Any]:
        """What is known of it once it is written."""
        item = self.item
        facts: dict[str, Any] = {
            "source": item.source_name,
            "source_dtype": short_name(item.source_info.dtype),
            "dtype": short_name(item.form.dtype),
            "source_sha256": (self._source_digest if self._changes else self._digest).hexdigest(),
            "sha256": self._digest.hexdigest(),
        }
        if item.form.exponent:
            facts["exponent"] = item.form.exponent
        if self._changes:
            facts["rounding"] = self._meter.result().as_dict()
        return facts
