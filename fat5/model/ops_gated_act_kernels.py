"""The kernels of activation, gate and dropout, and their launchers."""
# mypy: allow-untyped-defs, disable-error-code="misc"

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:  # a guarded import is what the loader of remote code asks for
    raise ImportError("the activation kernels need Triton") from error

from .ops_dropout_tile import keep_tile
from .ops_philox import dropped_steps, keep_scale

GELU_TANH, GELU, RELU, SILU = (tl.constexpr(i) for i in range(4))


@triton.jit
def activate(b_x, ACT: tl.constexpr):
    """The activation of fp32 values, and its derivative."""
    if ACT == RELU:  # comparisons such that NaN stays NaN
        b_y = tl.where(b_x <= 0.0, 0.0, b_x)
        b_slope = tl.where(b_x <= 0.0, 0.0, 1.0)
    elif ACT == GELU:
        b_cdf = 0.5 + 0.5 * tl.erf(b_x * 0.7071067811865476)
        b_y = b_x * b_cdf
        b_slope = b_cdf + b_x * 0.3989422804014327 * tl.exp(-0.5 * b_x * b_x)
    elif ACT == SILU:
        b_sigmoid = 1.0 / (1.0 + tl.exp(-b_x))
        b_y = b_x * b_sigmoid
        b_slope = b_sigmoid * (1.0 + b_x * (1.0 - b_sigmoid))
    else:  # 0.5 x (1 + tanh(u)) = x sigmoid(2 u)
        b_double = 1.5957691216057308 * (b_x + 0.044715 * b_x * b_x * b_x)
        b_sigmoid = 1.0 / (1.0 + tl.exp(-b_double))
        b_y = b_x * b_sigmoid
        b_double_slope = 1.5957691216057308 * (1.0 + 0.134145 * b_x * b_x)
        b_slope = b_sigmoid + b_y * (1.0 - b_sigmoid) * b_double_slope
    return b_y, b_slope


@triton.jit
def forward_kernel(
    p_x, p_up, p_seed, p_out, stride_x, stride_up, blocks, dropped, scale,
    F: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Grid (rows x blocks of a row)."""
    row = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK
    o_f = first + tl.arange(0, BLOCK)
    m_f = o_f < F
    row_64 = row.to(tl.int64)
    b_x = tl.load(p_x + row_64 * stride_x + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_y, _ = activate(b_x, ACT)
    if GATED:
        b_y *= tl.load(p_up + row_64 * stride_up + o_f, mask=m_f, other=0.0).to(tl.float32)
    if DROPOUT:
        b_y *= tl.where(keep_tile(p_seed, row, first, dropped, BLOCK), scale, 0.0)  # NaN stays NaN, as in torch
    tl.store(p_out + row_64 * F + o_f, b_y.to(p_out.dtype.element_ty), mask=m_f)


@triton.jit
def backward_kernel(
    p_dout, p_x, p_up, p_seed, p_dx, p_dup, p_out, stride_dout, stride_x, stride_up, stride_dx, stride_dup, blocks,
    dropped, scale,
    F: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr,
    RECOMPUTE: tl.constexpr,
):  # fmt: skip
    """Grid (rows x blocks of a row). The activation is computed again.

    With RECOMPUTE `p_out` receives what forward wrote there.
    """
    row = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK
    o_f = first + tl.arange(0, BLOCK)
    m_f = o_f < F
    row_64 = row.to(tl.int64)
    b_dy = tl.load(p_dout + row_64 * stride_dout + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_x = tl.load(p_x + row_64 * stride_x + o_f, mask=m_f, other=0.0).to(tl.float32)
    if DROPOUT:
        b_factor = tl.where(keep_tile(p_seed, row, first, dropped, BLOCK), scale, 0.0)
        b_dy *= b_factor
    b_y, b_slope = activate(b_x, ACT)
    if GATED:
        b_up = tl.load(p_up + row_64 * stride_up + o_f, mask=m_f, other=0.0).to(tl.float32)
        b_dup = (b_dy * b_y).to(p_dup.dtype.element_ty)
        tl.store(p_dup + row_64 * stride_dup + o_f, b_dup, mask=m_f)
        b_dy *= b_up
        b_y *= b_up
    if RECOMPUTE:
        if DROPOUT:
            b_y *= b_factor
        tl.store(p_out + row_64 * F + o_f, b_y.to(p_out.dtype.element_ty), mask=m_f)
    b_dx = b_dy * b_slope
    if ACT == RELU:  # torch's has no gradient there, whatever comes in
        b_dx = tl.where(b_x <= 0.0, 0.0, b_dx)
    tl.store(p_dx + row_64 * stride_dx + o_f, b_dx.to(p_dx.dtype.element_ty), mask=m_f)


def launch_forward(
    x: torch.Tensor, up: torch.Tensor | None, act: int, dropout_p: float, seed: torch.Tensor | None
) -> torch.Tensor:
    """`dropout(act(x) * up)`, contiguous.

    Args:
        x: `[rows, F]`, rows of any stride.
        up: likewise; None for none.
        act: index of the activation.
        dropout_p: probability of dropping an element.
        seed: of the dropout, int64 `[1]`.
    """
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if out.numel():
        block, blocks = launch_shape(width)
        forward_kernel[(rows * blocks,)](
            x, up, seed, out, x.stride(0), 0 if up is None else up.stride(0), blocks, dropped_steps(dropout_p),
            keep_scale(dropout_p), width, block, act, up is not None, dropout_p > 0, num_warps=4,
        )  # fmt: skip
    return out


def launch_backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    up: torch.Tensor | None,
    dx: torch.Tensor,
    dup: torch.Tensor | None,
    act: int,
    dropout_p: float,
    seed: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> None:
    """Write the gradients of `x` and `up` to `dx` and `dup`; all `[rows, F]`, rows of any stride.

    What `launch_forward` returned is written once more to `out`, contiguous, if it is given.
    """
    rows, width = x.shape
    if not x.numel():
        return
    block, blocks = launch_shape(width)
    stride_up, stride_dup = (0 if t is None else t.stride(0) for t in (up, dup))
    backward_kernel[(rows * blocks,)](
        dout, x, up, seed, dx, dup, out, dout.stride(0), x.stride(0), stride_up, dx.stride(0), stride_dup, blocks,
        dropped_steps(dropout_p), keep_scale(dropout_p), width, block, act, up is not None, dropout_p > 0,
        out is not None, num_warps=4,
    )  # fmt: skip


def launch_shape(width: int) -> tuple[int, int]:
    """Elements of a program, 16 a thread at most, and programs of a row."""
    block = min(max(triton.next_power_of_2(width), 32), 2048)
    return block, triton.cdiv(width, block)
