"""Write a folder of safetensors shards, one tensor in memory at a time, complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fat5convert.errors import ConvertError
from fat5convert.formats import SAFETENSORS_DTYPES, TensorInfo
from fat5convert.source import read_json, write_json

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_CHUNK = 1 << 24  # bytes hashed and written at a time

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Item:
    """A tensor to be written: its description is known at once, its values when their turn comes."""

    name: str
    info: TensorInfo
    produce: Callable[[], torch.Tensor]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The values of a CPU tensor as bytes, little-endian, row-major; copies only if they are not contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def hash_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of the values as safetensors stores them."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_weights(folder: Path, items: Sequence[Item], shard_size: int, advance: Advance) -> dict[str, str]:
    """Write `model.safetensors`, or numbered shards with their index when one file would exceed `shard_size`.

    Args:
        folder: existing folder to write into.
        items: the tensors, in order.
        shard_size: most bytes of data per file (a larger tensor gets a file of its own).
        advance: called with every count of bytes written.

    Returns:
        name -> SHA-256 of the written values, computed as they pass.
    """
    shards = _split(items, shard_size)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    hashes: dict[str, str] = {}
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, advance, hashes)
    if len(shards) > 1:
        total = sum(item.info.nbytes for item in items)
        weight_map = {item.name: name for name, shard in zip(names, shards, strict=True) for item in shard}
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
    return hashes


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


def _write_shard(path: Path, items: Sequence[Item], advance: Advance, hashes: dict[str, str]) -> None:
    # Wide dtypes first: then every tensor of the file is aligned to its own size.
    items = sorted(items, key=lambda item: -item.info.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for item in items:
        end = offset + item.info.nbytes
        dtype = _DTYPE_NAMES[item.info.dtype]
        header[item.name] = {"dtype": dtype, "shape": list(item.info.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for item in items:
            tensor = item.produce()
            if TensorInfo(tensor.dtype, tuple(tensor.shape)) != item.info:
                raise ConvertError(f"tensor {item.name} changed while it was being converted")
            data, digest = tensor_bytes(tensor), hashlib.sha256()
            for start in range(0, len(data), _CHUNK):
                part = data[start : start + _CHUNK]
                digest.update(part)
                file.write(part)
                advance(len(part))
            hashes[item.name] = digest.hexdigest()
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def staged(out: Path, overwrite: bool, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Give a temporary folder beside OUT that becomes OUT at the end, or vanishes if anything goes wrong.

    Args:
        out: the folder to be.
        overwrite: whether an existing OUT may be replaced; it is removed only after the new one is in place.
        replaceable: says whether an existing folder is one of ours; others are never removed.

    Raises:
        ConvertError: OUT exists and may not be replaced, or its parent cannot be written.
    """
    check_target(out, overwrite, replaceable)
    created = _missing_parents(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = _sibling(out, "partial")
        staging.mkdir()
    except OSError as error:
        _remove_empty(created)
        raise ConvertError(f"{out}: cannot be written ({_reason(error)})") from error
    try:
        yield staging
        for path in (*staging.iterdir(), staging):
            _sync(path)
        _publish(staging, out, overwrite)
    except OSError as error:
        raise ConvertError(f"{error.filename or out}: {_reason(error)}") from error
    finally:
        # After a success there is nothing left under this name.
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(created)


def check_target(out: Path, overwrite: bool, replaceable: Callable[[Path], bool]) -> None:
    """Refuse an OUT that exists, unless it may be and is asked to be replaced."""
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise ConvertError(f"{out}: exists already. Give --overwrite to replace it, or another folder.")
    if not out.is_dir() or out.is_symlink() or not replaceable(out):
        raise ConvertError(f"{out}: exists and does not look like an earlier output, so it is not replaced")


def holds_model(*model_types: str) -> Callable[[Path], bool]:
    """A test for `replaceable`: the folder's config.json is of one of these model types, or the folder is empty."""

    def test(folder: Path) -> bool:
        if not any(folder.iterdir()):
            return True
        try:
            return read_json(folder / "config.json").get("model_type") in model_types
        except ConvertError:
            return False

    return test


def check_space(out: Path, needed: int) -> None:
    """Refuse to start when the disk cannot hold the result."""
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConvertError(f"{out}: needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free")


def _publish(staging: Path, out: Path, overwrite: bool) -> None:
    if not out.exists():
        staging.rename(out)
    elif not overwrite:
        raise ConvertError(f"{out}: appeared while this was running; nothing was replaced")
    else:
        old = _sibling(out, "old")
        out.rename(old)
        try:
            staging.rename(out)
        except BaseException:
            old.rename(out)
            raise
        shutil.rmtree(old)
    _sync(out.parent)


def _sibling(out: Path, kind: str) -> Path:
    return out.parent / f".{out.name}.{secrets.token_hex(4)}.{kind}"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _missing_parents(out: Path) -> list[Path]:
    return [parent for parent in out.absolute().parents if not parent.exists()]


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _reason(error: OSError) -> str:
    return "no space left on the disk" if error.errno == errno.ENOSPC else (error.strerror or str(error))
