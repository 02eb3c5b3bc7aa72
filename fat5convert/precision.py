"""What becomes of the numbers: dtype policies, whether weights fit bfloat16 exactly, and what rounding lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

# The policies of --dtype; None keeps every tensor's own dtype.
POLICIES: dict[str, torch.dtype | None] = {"keep": None, "bfloat16": torch.bfloat16, "float32": torch.float32}
CONVERTIBLE = (torch.float32, torch.float16, torch.bfloat16)
_CHUNK = 1 << 22  # values looked at together, so that reports need little memory


@dataclass(frozen=True)
class RoundingError:
    """What rounding did to one tensor, relative to its values before; zero when it was exact."""

    max_relative: float
    rms_relative: float
    overflows: int
    underflows: int

    def as_dict(self) -> dict[str, float | int]:
        """The fields, for JSON."""
        return asdict(self)


def short_name(dtype: torch.dtype) -> str:
    """Name of a dtype as configs write it: `float32`, not `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def apply(tensor: torch.Tensor, policy: str) -> torch.Tensor:
    """Put a tensor into the dtype of a policy; bfloat16 rounds to nearest, ties to even, float32 is exact."""
    target = POLICIES[policy]
    return tensor if target is None else tensor.to(target)


def rounding_error(before: torch.Tensor, after: torch.Tensor) -> RoundingError:
    """Measure in fp64 what a change of dtype lost.

    `max_relative` is the largest |after - before| / |before| over the values that neither overflow nor vanish,
    `rms_relative` the norm of the difference over the norm of `before`.
    """
    worst = difference = norm = 0.0
    overflows = underflows = 0
    for old, new in zip(_chunks(before), _chunks(after), strict=True):
        old, new = old.double(), new.double()
        overflow = new.isinf() & old.isfinite()
        underflow = (new == 0) & (old != 0)
        overflows += int(overflow.sum())
        underflows += int(underflow.sum())
        usual = old.isfinite() & (old != 0) & ~overflow & ~underflow
        error = (new - old)[usual].abs()
        if error.numel():
            worst = max(worst, float((error / old[usual].abs()).max()))
        lost = torch.where(underflow, old, 0.0)
        difference += float(error.square().sum() + lost.square().sum())
        norm += float(old[old.isfinite()].square().sum())
    return RoundingError(worst, (difference / norm) ** 0.5 if norm else 0.0, overflows, underflows)


def is_bfloat16_exact(tensor: torch.Tensor) -> bool:
    """Whether every value already is a bfloat16 value (of fp32: the low 16 bits are zero)."""
    if tensor.dtype == torch.bfloat16:
        return True
    return all(bool(((chunk.bfloat16().to(chunk.dtype) == chunk) | chunk.isnan()).all()) for chunk in _chunks(tensor))


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    return iter(tensor.reshape(-1).split(_CHUNK)) if tensor.numel() else iter(())
