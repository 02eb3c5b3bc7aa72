"""The kernel that adds a token to a static cache, and its launcher."""
# mypy: allow-untyped-defs, disable-error-code="misc"

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:  # a guarded import is what the loader of remote code asks for
    raise ImportError("the kernel of static caches needs Triton") from error

from .ops_early_launch import launch_options, wait_for_earlier


@triton.jit(do_not_specialize=["length"])
def append_kernel(
    p_key, p_value, p_keys, p_values, p_position, p_count,
    stride_kb, stride_kh, stride_vb, stride_vh, stride_ksb, stride_ksh, stride_ksl, stride_vsb, stride_vsh, stride_vsl,
    length,
    H: tl.constexpr, D: tl.constexpr, EARLY: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (batch): one row's key and value, of all heads, to their place. The first program counts the token.

    Beyond the end of the cache there is no place: then the last token becomes NaN, as nobody can raise an error here.
    """
    batch = tl.program_id(0).to(tl.int64)
    o_h, o_d = tl.arange(0, BLOCK_H)[:, None].to(tl.int64), tl.arange(0, BLOCK_D)[None, :]
    m = (o_h < H) & (o_d < D)
    wait_for_earlier(EARLY)
    position = tl.load(p_position)
    place = tl.minimum(position, length - 1)
    b_key = tl.load(p_key + batch * stride_kb + o_h * stride_kh + o_d, mask=m)
    b_value = tl.load(p_value + batch * stride_vb + o_h * stride_vh + o_d, mask=m)
    b_key = tl.where(position < length, b_key.to(tl.float32), float("nan")).to(b_key.dtype)
    p_keys += batch * stride_ksb + place * stride_ksl
    p_values += batch * stride_vsb + place * stride_vsl
    tl.store(p_keys + o_h * stride_ksh + o_d, b_key, mask=m)
    tl.store(p_values + o_h * stride_vsh + o_d, b_value, mask=m)
    if tl.program_id(0) == 0:
        tl.store(p_count, position + 1)


def launch_append(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    count: torch.Tensor,
    early: bool,
) -> None:
    """Write `[B, H, 1, D]` into `[B, H, L, D]` at an int64 position, and that of the next token into `count`.

    All last axes have stride 1. `early`: see `ops_early_launch`.
    """
    batch, heads, _, width = key.shape
    append_kernel[(batch,)](
        key, value, keys, values, position, count, *key.stride()[:2], *value.stride()[:2], *keys.stride()[:3],
        *values.stride()[:3], keys.shape[2], heads, width, early, triton.next_power_of_2(heads),
        triton.next_power_of_2(width), num_warps=4, **launch_options(early),
    )  # fmt: skip
