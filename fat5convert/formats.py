"""Weight files, read lazily: safetensors and `torch.save` pickles, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import torch

from fat5convert.errors import ConvertError

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# What torch.load lets through from the zip and pickle readers when a file is cut off or garbled.
_MALFORMED = (RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, struct.error)
MAX_HEADER_BYTES = 100_000_000  # the limit that the safetensors library sets
CHUNK = 1 << 18  # values of a tensor in memory at a time: few enough for a cache, and for memory that is used again


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return self.numel * self.dtype.itemsize


class TensorFile(Protocol):
    """A weight file: what it holds, and one tensor of it at a time."""

    path: Path

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name -> description of every tensor in the file."""
        ...

    def load(self, name: str) -> torch.Tensor:
        """Return the values of one tensor, on the CPU."""
        ...

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """Give the values of one tensor in order, flat, at most `CHUNK` at a time."""
        ...


class SafetensorsFile:
    """A `.safetensors` file; the header is checked against the file's size before anything is read.

    Layout: 8 bytes little-endian header length, the JSON header, then the data without gaps
    (https://github.com/huggingface/safetensors, "Format").
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: dict[str, int] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._read_header()

    def load(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            ConvertError: the file became shorter since its header was read.
        """
        (values,) = self._read(name, max(1, self.tensors[name].numel))
        return values.view(self.tensors[name].shape)

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """Read one tensor bit by bit; raises as `load`."""
        return self._read(name, CHUNK)

    def _read(self, name: str, most: int) -> Iterator[torch.Tensor]:
        info = self.tensors[name]
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._offsets[name])
            for start in range(0, max(1, info.numel), most):
                nbytes = min(most, info.numel - start) * info.dtype.itemsize
                buffer = torch.empty(nbytes, dtype=torch.uint8)
                view, done = buffer.numpy().data, 0
                while done < nbytes:
                    count = file.readinto(view[done:])
                    if not count:
                        raise ConvertError(f"{self.path}: the file ended while tensor {name} was being read")
                    done += count
                yield buffer.view(info.dtype)

    def _read_header(self) -> None:
        size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version " and size < 1024:
                raise ConvertError(f"{self.path}: a pointer of Git LFS, no weights. Fetch them by `git lfs pull`.")
            if len(start) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise self._bad(f"truncated or no safetensors file (header of {length} bytes, file of {size})")
            try:
                header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
            except (ValueError, RecursionError) as error:
                raise self._bad(f"unreadable safetensors header ({error})") from error
        if not isinstance(header, dict):
            raise self._bad("the safetensors header is not a JSON object")
        header.pop("__metadata__", None)

        spans = []
        for name, entry in header.items():
            info, begin, end = self._read_entry(name, entry)
            self.tensors[name] = info
            self._offsets[name] = 8 + length + begin
            spans.append((begin, end, name))
        spans.sort()
        data_size = size - 8 - length
        if spans and spans[-1][1] > data_size:
            raise self._bad(f"truncated: its header promises {spans[-1][1]} bytes of data, the file has {data_size}")
        if (spans[-1][1] if spans else 0) != data_size or (spans and spans[0][0] != 0):
            raise self._bad("its header does not account for all of its data")
        for (_, end, name), (begin, _, following) in pairwise(spans):
            if begin != end:
                raise self._bad(f"tensors {name} and {following} overlap or leave a gap")

    def _read_entry(self, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
        if not isinstance(entry, dict):
            raise self._bad(f"tensor {name} has no description in the header")
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in SAFETENSORS_DTYPES:
            raise self._bad(f"tensor {name} has the unknown dtype {dtype!r}")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise self._bad(f"tensor {name} has a malformed shape or offsets in the header")
        info = TensorInfo(SAFETENSORS_DTYPES[dtype], tuple(shape))
        if offsets[1] - offsets[0] != info.nbytes:
            raise self._bad(f"tensor {name} of shape {shape} {dtype} cannot fill {offsets[1] - offsets[0]} bytes")
        return info, offsets[0], offsets[1]

    def _bad(self, what: str) -> ConvertError:
        return ConvertError(f"{self.path}: {what}. Download or copy the file again.")


def _first_call(path: Path) -> str | None:
    """What a pickle that is no checkpoint would import and call first; None if it is no pickle, or calls nothing."""
    name, words = None, [""] * 2
    try:
        with open(path, "rb") as file:
            for opcode, argument, _ in pickletools.genops(file.read(1 << 20)):
                if opcode.name == "GLOBAL":
                    name = str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL":
                    name = ".".join(words[-2:])
                elif opcode.name in ("REDUCE", "OBJ", "INST", "NEWOBJ", "NEWOBJ_EX"):
                    return name if name and not name.startswith(("torch.", "collections.")) else None
                elif isinstance(argument, str):
                    words.append(argument)
    except (ValueError, OSError):
        pass
    return None


class PickleFile:
    """A `pytorch_model.bin`; unpickled without running code, and memory-mapped where the format allows it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Files from before torch 1.6 are no zip archives and cannot be mapped: they are read whole.
        mapped = zipfile.is_zipfile(path)
        try:
            if mapped:
                _check_archive(path)
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            unsafe = re.search(r"GLOBAL (\S+)", str(error))
            called = unsafe.group(1) if unsafe else _first_call(path)
            if called:
                what = f"refused, because reading it would run code ({called})"
                raise ConvertError(f"{path}: {what}. Ask its author for a safetensors file.") from error
            raise ConvertError(f"{path}: truncated or no weights file. Download or copy it again.") from error
        except (*_MALFORMED, zipfile.BadZipFile, RecursionError) as error:
            raise ConvertError(f"{path}: truncated or no weights file. Download or copy it again.") from error
        if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
            raise ConvertError(f"{path}: expected a plain dictionary of tensors (a state dict)")
        self._state: dict[str, torch.Tensor] = loaded
        self.tensors = {}
        for name, tensor in loaded.items():
            plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_neg()
            if not isinstance(name, str) or not plain:
                raise ConvertError(f"{path}: tensor {name!r} is no plain tensor with values")
            # Strides of zero make a few bytes look like a tensor of any size.
            if tensor.nbytes > tensor.untyped_storage().nbytes():
                raise ConvertError(f"{path}: tensor {name} is larger than the data stored for it")
            self.tensors[name] = TensorInfo(tensor.dtype, tuple(tensor.shape))

    def load(self, name: str) -> torch.Tensor:
        """Return one tensor; its pages are read from the file as they are touched."""
        return self._state[name]

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """Give one tensor bit by bit."""
        return chunks_of(self._state[name].detach())


def chunks_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The values in order, `CHUNK` at a time; of one that is not contiguous no more is copied."""
    if tensor.is_contiguous() or tensor.numel() <= CHUNK:
        yield from tensor.reshape(-1).split(CHUNK)
        return
    gathered, count = [], 0
    for values in _pieces_of(tensor):
        while len(values):
            gathered.append(values[: CHUNK - count])
            values = values[CHUNK - count :]
            count += len(gathered[-1])
            if count == CHUNK:
                yield torch.cat(gathered)
                gathered, count = [], 0
    if gathered:
        yield torch.cat(gathered)


def _pieces_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The values in order, at most `CHUNK` at a time."""
    rows = CHUNK // max(1, tensor[0].numel())
    if rows:
        yield from (part.reshape(-1) for part in tensor.split(rows))
    else:
        for row in tensor:
            yield from _pieces_of(row)


def _check_archive(path: Path) -> None:
    """Refuse a zip archive that is larger inside than outside: torch stores, it never compresses."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ConvertError(f"{path}: a compressed archive, which torch does not write. Ask for a safetensors file.")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ConvertError(f"{path}: its entries overlap, as in a zip bomb. Ask for a safetensors file.")
    pickled = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
    if pickled > MAX_HEADER_BYTES:
        raise ConvertError(f"{path}: {pickled} bytes of pickle, more than any weights file needs")


def open_weights(path: Path) -> TensorFile:
    """Open a weight file by its suffix.

    Raises:
        ConvertError: the file is missing, unreadable, truncated, malformed, or a pickle that would run code.
    """
    if not path.is_file():
        raise ConvertError(f"{path}: missing. The checkpoint needs this file.")
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read ({error.strerror})") from error
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result
