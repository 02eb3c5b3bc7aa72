"""SHA-256 of tensors, as safetensors stores them, and of files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch


class Chunked(Protocol):
    """A weight file or a checkpoint."""

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """Give the values of one tensor in order, flat, a few at a time."""
        ...


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The values of a CPU tensor as bytes, little-endian, row-major; copies only if they are not contiguous."""
    flat = tensor if tensor.dim() == 1 else tensor.reshape(-1)
    if flat.stride(0) != 1:  # `contiguous` takes a single value for contiguous, whatever its stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data


def hash_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of the values as safetensors stores them."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def hash_chunks(source: Chunked, name: str) -> str:
    """SHA-256 of one tensor's values, read bit by bit."""
    return hash_values(source.chunks(name))


def hash_values(chunks: Iterable[torch.Tensor]) -> str:
    """SHA-256 of the values of one tensor, given bit by bit."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(tensor_bytes(chunk))
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
