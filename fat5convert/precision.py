"""What becomes of the numbers: dtype policies, whether weights fit bfloat16 exactly, and what rounding lost."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch

from fat5convert.options import DTYPES

# The policies of --dtype; None keeps every tensor's own dtype. `auto` is one of the two, decided by the values.
POLICIES: dict[str, torch.dtype | None] = {name: getattr(torch, name, None) for name in DTYPES}
_BLOCK = 1 << 16  # values whose intermediate results stay in a core's cache
_SMALL = 1e-24  # sum from which on squares too small for fp32 do not count
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
CONVERTIBLE = (torch.float32, torch.float16, torch.bfloat16, *_FP8)


@dataclass(frozen=True)
class Form:
    """What a tensor becomes: multiplied by 2**exponent, which is exact, and then rounded to a dtype."""

    dtype: torch.dtype
    exponent: int = 0

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """Put values into this form; rounds to nearest, ties to even."""
        if self.exponent:
            values = values.float() * 2.0**self.exponent
        return values.to(self.dtype)

    def undo(self, values: torch.Tensor) -> torch.Tensor:
        """The fp32 values that those in this form stand for."""
        return values.float() * 2.0**-self.exponent if self.exponent else values.float()


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


class ErrorMeter:
    """Measures what rounding does to one tensor, given bit by bit.

    `max_relative` is the largest |after - before| / |before| over the values that neither overflow nor vanish,
    `rms_relative` the norm of the difference over the norm of `before`, without the overflows.
    """

    def __init__(self) -> None:
        self._worst = self._difference = self._norm = 0.0
        self._overflows = self._underflows = 0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Take in some values and what they became (as fp32, their scale undone)."""
        if before.numel():
            for old, new in zip(before.split(_BLOCK), after.split(_BLOCK), strict=True):
                self._add_block(old.float(), new.float())

    def _add_block(self, old: torch.Tensor, new: torch.Tensor) -> None:
        error = new - old  # of a value and its rounding, which is exact in fp32
        difference, norm = _square_sum(error), _square_sum(old)
        low, high = map(float, torch.aminmax(error.div_(old)))  # either is NaN if any value is
        # Almost always that is all: a zero makes a NaN, what vanishes an error of -1, an infinity an infinite sum.
        if not (-1 < low <= high < 1 and math.isfinite(difference) and math.isfinite(norm)):
            finite = old.isfinite()
            overflow = ~new.isfinite() & finite
            vanished = (new == 0) & (old != 0)
            self._overflows += int(overflow.sum())
            self._underflows += int(vanished.sum())
            error = (new - old).masked_fill_(overflow | ~finite, 0.0)
            old = old.masked_fill(~finite, 0.0)
            difference, norm = _square_sum(error), _square_sum(old)
            low, high = map(float, torch.aminmax(error.div_(old).masked_fill_((old == 0) | vanished, 0.0)))
        self._worst = max(self._worst, -low, high)
        self._difference += difference
        self._norm += norm

    def result(self) -> RoundingError:
        """The errors of all values so far."""
        rms = (self._difference / self._norm) ** 0.5 if self._norm else 0.0
        return RoundingError(self._worst, rms, self._overflows, self._underflows)


def _square_sum(values: torch.Tensor) -> float:
    """Sum of the squares of a block: in fp32, to five digits, where no square that matters leaves its range."""
    total = float(torch.dot(values, values))
    if _SMALL < total < math.inf:
        return total
    precise = values.double()
    return float(torch.dot(precise, precise))


def short_name(dtype: torch.dtype) -> str:
    """Name of a dtype as configs write it: `float32`, not `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a tensor is kept as: its own dtype, but for those that no model computes in.

    Fp8 becomes bfloat16, which holds it, and an integer fp32, which is what it becomes in a product with fp32.
    """
    if dtype == torch.int64:
        return torch.float32
    return torch.bfloat16 if dtype in _FP8 else dtype


def is_bfloat16_exact(chunks: Iterable[torch.Tensor]) -> bool:
    """Whether every value already is a bfloat16 value (of fp32: the low 16 bits are zero); stops at the first not."""
    for chunk in chunks:
        if chunk.dtype in (torch.bfloat16, *_FP8):
            return True
        if not bool(((chunk.bfloat16().to(chunk.dtype) == chunk) | chunk.isnan()).all()):
            return False
    return True
