"""Warm-up, stable, decay: a schedule that does not need to know from the start how long the run will be."""

import math
from collections.abc import Sequence
from typing import Literal


class WarmupStableDecay:
    """Learning-rate factor of a step: up to 1, stay there, and down only over the last steps.

    Hu et al. (2024), "MiniCPM", section 4, https://arxiv.org/abs/2404.06395; the decay shape 1 - sqrt is that of Hägele
    et al. (2024), "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations",
    https://arxiv.org/abs/2405.18392. Two ways to go on for longer:

    - from a checkpoint before the decay, with a larger `steps`: what came before is the same, so is the result of a run
      that had been as long from the start;
    - from the end of the decay, with a larger `steps` and the step of that end added to `earlier_ends`: the rate rises
      again over `rewarm_steps`, stays, and decays at the new end.

    Args:
        steps: where the last decay ends.
        warmup_steps: over which the rate rises from 0.
        decay_steps: length of each decay.
        decay: its shape: `linear`, `cosine` or `sqrt` (1 - sqrt of the way).
        final: factor at the end of a decay.
        earlier_ends: steps at which earlier decays ended, rising.
        rewarm_steps: over which the rate rises from `final` to 1 after each of them.

    Raises:
        ValueError: the phases overlap or a value is out of range.
    """

    def __init__(
        self,
        steps: int,
        warmup_steps: int,
        decay_steps: int,
        decay: Literal["linear", "cosine", "sqrt"] = "sqrt",
        final: float = 0.0,
        earlier_ends: Sequence[int] = (),
        rewarm_steps: int = 0,
    ) -> None:
        if decay not in _SHAPES:
            raise ValueError(f"decay must be one of {', '.join(_SHAPES)}, not {decay!r}")
        if not 0 <= final < 1:
            raise ValueError(f"final must be from 0 up to, not including, 1, not {final}")
        if decay_steps < 1 or rewarm_steps < 0 or warmup_steps < 0:
            raise ValueError("decay_steps must be at least 1, rewarm_steps and warmup_steps 0 or more")
        ends = [*earlier_ends, steps]
        rises = [warmup_steps, *[rewarm_steps] * len(earlier_ends)]
        for start, end, rise in zip([0, *earlier_ends], ends, rises, strict=True):
            if end - start < rise + decay_steps:
                phases = f"{rise} steps of warm-up and {decay_steps} of decay"
                raise ValueError(f"from step {start} to {end} there is no room for {phases}")
        self.starts, self.ends, self.rises = [0, *earlier_ends], ends, rises
        self.decay_steps, self.decay, self.final = decay_steps, decay, final

    def __call__(self, step: int) -> float:
        """Give the factor for the update after `step` updates, from `final` (0 in the first warm-up) to 1."""
        cycle = next((i for i, end in enumerate(self.ends) if step < end), None)
        if cycle is None:
            return self.final
        start, end, rise = self.starts[cycle], self.ends[cycle], self.rises[cycle]
        if step - start < rise:
            low = self.final if cycle else 0.0
            return low + (1 - low) * (step - start) / rise
        if step < end - self.decay_steps:
            return 1.0
        way = (step - (end - self.decay_steps)) / self.decay_steps
        return self.final + (1 - self.final) * _SHAPES[self.decay](way)


_SHAPES = {
    "linear": lambda way: 1 - way,
    "cosine": lambda way: 0.5 * (1 + math.cos(math.pi * way)),
    "sqrt": lambda way: 1 - math.sqrt(way),
}
