"""Operators registered with `torch.library`, called without its dispatcher where nothing watches.

A registered operator is what `torch.compile`, export, fake tensors and dispatch modes need. Each call of one with a
gradient also costs more Python than the launch of its kernel, and a training step makes hundreds of calls; so eager
code calls the same functions directly, under an `autograd.Function`.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .ops_graph import is_captured

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FEW_ELEMENTS = 1 << 18  # 64 rows of 4096: a pass over them is a microsecond
FEW_ELEMENTS_OF_A_CPU = 1 << 13


class Operator:
    """A function of tensors and plain numbers that mutates nothing, by its name in `torch.ops`.

    Args:
        name: `namespace::name`.
        function: annotated as `torch.library.custom_op` requires.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.function = function = on_its_device(function)
        self.definition = torch.library.custom_op(name, function, mutates_args=())
        namespace, _, short = name.partition("::")
        self.registered = getattr(getattr(torch.ops, namespace), short)
        self.direct: type[torch.autograd.Function] | None = None

    def register_fake(self, shapes: Callable[..., Any]) -> Callable[..., Any]:
        """Give the function that makes outputs of the right shapes, and nothing else."""
        return self.definition.register_fake(shapes)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """Give the gradient, as `torch.library.register_autograd` takes it."""
        self.definition.register_autograd(backward, setup_context=setup_context)
        function = self.function

        class Direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                output = function(*inputs)
                setup_context(ctx, inputs, output)
                return output

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
                return backward(ctx, *gradients)

        self.direct = Direct

    def __call__(self, *inputs: Any) -> Any:
        """Call it, through the dispatcher only where somebody watches there."""
        if is_watched():
            return self.registered(*inputs)
        if self.direct is None or not torch.is_grad_enabled():
            return self.function(*inputs)
        return self.direct.apply(*inputs)


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of tensors on one device, run with that as the current one, on which Triton launches kernels."""

    @functools.wraps(function)
    def run(*inputs: Any, **options: Any) -> Any:
        device = next(x.device for x in (*inputs, *options.values()) if isinstance(x, torch.Tensor))
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(*inputs, **options)
        with torch.cuda.device(device):
            return function(*inputs, **options)

    return run


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator that makes an `Operator`."""
    return lambda function: Operator(name, function)


def is_launch_bound(x: torch.Tensor) -> bool:
    """Whether work on `x` takes longer to launch than to run, as it does for the few tokens of a decoding step.

    Launching one of Triton's kernels takes as long as launching three or four of torch's, which then serve better: on a
    GPU, without gradients, and not in a graph, which launches all alike. On a CPU there are none of Triton's, unless
    they are interpreted, but then each of torch's operations counts.
    """
    if torch.is_grad_enabled() or is_watched() or (INTERPRETED and not x.is_cuda):
        return False
    if x.numel() > (FEW_ELEMENTS if x.is_cuda else FEW_ELEMENTS_OF_A_CPU):
        return False
    return not (is_transformed() or is_captured(x.device))


def is_watched() -> bool:
    """Whether torch compiles, or a dispatch mode (fake tensors, tracing) or a `torch.func` transform is on."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None


def may_work_in_place(x: torch.Tensor) -> bool:
    """Whether plain torch may write into what it has made itself: no gradients, and no dtype or batch of another's.

    On a CPU new memory takes longer than the arithmetic in it.
    """
    return not torch.is_grad_enabled() and not is_watched() and not torch.is_autocast_enabled(x.device.type)


def is_transformed() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is on, which take plain torch alone.

    The kernels would give derivatives of zero there, or an obscure error.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
