"""Forward and backward in CUDA graphs: Python takes longer over a step than the GPU, which need not wait for it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Step = Callable[[dict[str, Any], Tensor], Tensor]

MOST_GRAPHS = 64


class GraphedStep:
    """A forward and backward pass that is captured for each combination of its inputs' shapes when it comes again.

    A first pass of any shape runs as it is, which also fills what is kept between passes (compiled kernels, constant
    tensors), and later ones replay the graph: the same kernels on the same random numbers. The graphs compute in memory
    of their own, which passes as they are cannot use.

    Args:
        step: takes inputs and the number of targets in the step, an int64 scalar tensor; adds to the parameters'
            gradients, and returns the detached loss. It must not look at the values of tensors.
        parameters: those of the step that receive gradients. These lie in the same memory throughout, as a graph needs
            it, and wherever one was set to None it begins at zero.
    """

    def __init__(self, step: Step, parameters: list[nn.Parameter]) -> None:
        self.step = step
        self.parameters = parameters
        self.gradients = [torch.zeros_like(p) for p in parameters]
        self._seen: set[tuple[Any, ...]] = set()
        self._graphs: dict[tuple[Any, ...], _Captured] = {}

    def __call__(self, inputs: dict[str, Any], targets: Tensor) -> Tensor:
        """Run the step; returns its loss, in memory of its own."""
        self._hold_gradients()
        shapes = tuple((name, x.shape if isinstance(x, Tensor) else x) for name, x in sorted(inputs.items()))
        if shapes not in self._graphs:
            if shapes not in self._seen or len(self._graphs) == MOST_GRAPHS:
                self._seen.add(shapes)
                return self.step(inputs, targets)
            pool = next((captured.graph.pool() for captured in self._graphs.values()), None)
            self._graphs[shapes] = _Captured(self.step, inputs, targets, pool)
        return self._graphs[shapes].replay(inputs, targets)

    def _hold_gradients(self) -> None:
        fresh = []
        for p, held in zip(self.parameters, self.gradients, strict=True):
            if p.grad is None:
                p.grad = held
                fresh.append(held)
            elif p.grad is not held:
                raise RuntimeError("a gradient was replaced between two passes: a graph would go on adding to the old")
        if fresh:
            torch._foreach_zero_(fresh)


class _Captured:
    """One graph, with the memory that it reads its inputs from. Graphs share theirs for what they compute: `pool`."""

    def __init__(self, step: Step, inputs: dict[str, Any], targets: Tensor, pool: Any) -> None:
        self.inputs = {name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}
        self.targets = targets.clone()
        self.graph = torch.cuda.CUDAGraph()
        # Of this thread alone: others pin the memory of batches to come, which would spoil the capture.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.loss = step(self.inputs, self.targets)

    def replay(self, inputs: dict[str, Any], targets: Tensor) -> Tensor:
        for name, x in inputs.items():
            if isinstance(x, Tensor):
                self.inputs[name].copy_(x)
        self.targets.copy_(targets)
        self.graph.replay()
        return self.loss.clone()
