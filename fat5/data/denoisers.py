"""Denoisers and the named mixtures of them.

A denoiser turns a window of text into an input and a target. `span` denoisers mask random spans (T5's span
corruption); `prefix` denoisers cut the window in two (prefix language modelling). UL2 (Tay et al., 2022,
arXiv:2205.05131) mixes seven.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Denoiser:
    """One way to corrupt a window.

    Attributes:
        kind: `span` masks spans; `prefix` gives the first part as input and the rest as target.
        proportion: its share of the mixture, relative to the others'.
        mu: mean length of a masked span in tokens (`span` only).
        r: share of the tokens that is masked, above 0 and below 1 (`span` only).
        mode: mode token put before the input, such as `[R]`; None for none.
        prefix: share of the window given as input (`prefix` only); None draws the cut uniformly.
        sentinel: whether the first sentinel marks the cut in input and target (`prefix` only).
    """

    kind: Literal["span", "prefix"] = "span"
    proportion: float = 1.0
    mu: float = 3.0
    r: float = 0.15
    mode: str | None = None
    prefix: float | None = None
    sentinel: bool = True

    def __post_init__(self) -> None:
        if self.proportion <= 0:
            raise ValueError(f"proportion must be above 0, not {self.proportion}")
        if self.kind == "span" and not 0 < self.r < 1:
            raise ValueError(f"r must be above 0 and below 1, not {self.r}")
        if self.kind == "span" and self.mu < 1:
            raise ValueError(f"mu must be at least 1, not {self.mu}")
        if self.prefix is not None and not 0 < self.prefix < 1:
            raise ValueError(f"prefix must be above 0 and below 1, or null for a uniform cut, not {self.prefix}")

    @property
    def name(self) -> str:
        """Say what it does in a few characters, for logs: `[R] span mu=3 r=0.15`."""
        mode = f"{self.mode} " if self.mode else ""
        if self.kind == "span":
            return f"{mode}span mu={self.mu:g} r={self.r:g}"
        cut = "uniform" if self.prefix is None else f"{self.prefix:g}"
        return f"{mode}prefix {cut}"


def _ul2(fifth: Denoiser, prefix: float) -> tuple[Denoiser, ...]:
    return (
        Denoiser("span", 0.165, 3.0, 0.15, "[R]"),
        Denoiser("span", 0.165, 8.0, 0.15, "[R]"),
        Denoiser("prefix", 0.34, mode="[S]", prefix=prefix),
        Denoiser("span", 0.0825, 3.0, 0.5, "[X]"),
        fifth,
        Denoiser("span", 0.0825, 64.0, 0.15, "[X]"),
        Denoiser("span", 0.0825, 64.0, 0.5, "[X]"),
    )


#: Mixtures by name. `ul2_fat5` is the published FAT5 one; `ul2_paper` is that of the UL2 paper's table 1,
#: with the same shares; `t5_span_corruption` and `prefix_lm` are the objectives of the T5 paper
#: (arXiv:1910.10683).
MIXTURES: dict[str, tuple[Denoiser, ...]] = {
    "ul2_fat5": _ul2(Denoiser("span", 0.0825, 8.0, 0.15, "[X]"), prefix=0.25),
    "ul2_paper": _ul2(Denoiser("span", 0.0825, 8.0, 0.5, "[X]"), prefix=0.75),
    "t5_span_corruption": (Denoiser("span", 1.0, 3.0, 0.15),),
    "prefix_lm": (Denoiser("prefix", 1.0, sentinel=False),),
}
