"""A kernel that is launched while the one before it still runs: its weights are on their way before its rows are there.

So are the kernels of a step of decoding, where launches would take a fifth of the time. Programmatic dependent launch,
from sm_90 on: "griddepcontrol" in NVIDIA's PTX manual.
"""
# mypy: allow-untyped-defs, disable-error-code="misc"

from typing import Any

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError as error:  # a guarded import is what the loader of remote code asks for
    raise ImportError("early launches need Triton") from error

from .ops_device import compute_capability

FEW_ROWS = 64
"""Up to so many a kernel ends before the launch of the next one is over."""


def launches_early(x: torch.Tensor, rows: int) -> bool:
    """Whether kernels on `rows` rows are to be launched early, on the GPU of a tensor."""
    return rows <= FEW_ROWS and compute_capability(x) >= 90


def launch_options(early: bool) -> dict[str, Any]:
    """What Triton is to be told when a kernel compiled with EARLY is launched."""
    return {"launch_pdl": True} if early else {}


@triton.jit
def wait_for_earlier(EARLY: tl.constexpr):
    """To be called before a kernel reads what an earlier one may have written, and before it writes anything.

    From here on the next kernel may be launched, which waits in its turn for all that this one does.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def prefetch_rows(p_rows, WIDTH: tl.constexpr):
    """Have 16-bit rows of a width, at pointers `[N]`, brought into the L2 cache, line of 128 bytes by line."""
    LINES: tl.constexpr = triton.next_power_of_2((WIDTH + 63) // 64)
    o_line = tl.arange(0, LINES) * 64
    p_lines = p_rows[:, None] + tl.where(o_line < WIDTH, o_line, 0)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [p_lines], dtype=tl.int32, is_pure=False, pack=1
    )
