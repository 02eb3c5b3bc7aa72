"""Launches of the kernels of the layer and of decoding, for `compile_kernels.py`: on CPU tensors, never computed."""

from collections.abc import Callable, Iterable, Iterator

import torch

from fat5.model import ops_cache_kernels as cache
from fat5.model import ops_cross_entropy_kernels as cross_entropy
from fat5.model import ops_decode_attention_kernels as decode_attention
from fat5.model import ops_few_rows_linear_kernels as few_rows
from fat5.model import ops_gated_act_kernels as gated_act
from fat5.model import ops_gated_linear_kernels as gated_linear
from fat5.model import ops_rms_norm_kernels as rms_norm
from fat5.model.ops_cross_entropy import new_rows
from fat5.model.ops_early_launch import FEW_ROWS

OPTIONS = {
    "norm": {
        "width": [128, 768, 1000, 4096, 8192],
        "dtype": ["bfloat16", "float32"],
        "residual": ["none", "same", "float32"],
        "dropout": [False, True],
        "recompute": [False, True],
    },
    "activation": {
        "width": [1000, 2816],
        "dtype": ["bfloat16", "float32"],
        "act": [0, 1, 2, 3],
        "gated": [False, True],
        "dropout": [False, True],
        "recompute": [False, True],
    },
    "gated linear": {
        "width": [768, 1000],
        "rows": [8, 64, 1024, 8192],
        "dtype": ["bfloat16", "float16"],
        "act": [0, 1],
    },
    "few rows linear": {
        "width": [768, 1000, 4096],
        "rows": [16, 32, 64],
        "dtype": ["bfloat16", "float16"],
        "weights": [1, 2, 3],
    },
    "decode attention": {
        "width": [8, 64, 80, 128, 256],
        "rows": [1, 512],  # few: the keys are shared out
        "dtype": ["bfloat16", "float16", "float32"],
        "bias": [False, True],
    },
    "append to cache": {
        "width": [8, 64, 80, 256],
        "dtype": ["bfloat16", "float16", "float32"],
    },
    "loss": {
        "width": [999, 32128, 250112],
        "dtype": ["bfloat16", "float32"],
        "smoothing": [False, True],
        "gradient": [False, True],
    },
}
FIRST = [
    {
        "capability": 90,
        "op": "norm",
        "width": 768,
        "dtype": "bfloat16",
        "residual": "same",
        "dropout": True,
        "recompute": True,
    },
    {
        "capability": 80,
        "op": "norm",
        "width": 8192,
        "dtype": "bfloat16",
        "residual": "float32",
        "dropout": False,
        "recompute": False,
    },
    {
        "capability": 90,
        "op": "activation",
        "width": 2048,
        "dtype": "bfloat16",
        "act": 0,
        "gated": True,
        "dropout": True,
        "recompute": True,
    },
    {"capability": 90, "op": "gated linear", "width": 768, "rows": 8192, "dtype": "bfloat16", "act": 0},
    {"capability": 86, "op": "gated linear", "width": 1000, "rows": 8192, "dtype": "float16", "act": 0},
    {"capability": 80, "op": "gated linear", "width": 768, "rows": 8, "dtype": "bfloat16", "act": 0},
    {"capability": 90, "op": "few rows linear", "width": 768, "rows": 16, "dtype": "bfloat16", "weights": 3},
    {"capability": 86, "op": "few rows linear", "width": 4096, "rows": 64, "dtype": "bfloat16", "weights": 1},
    {"capability": 100, "op": "decode attention", "width": 64, "rows": 1, "dtype": "bfloat16", "bias": True},
    {"capability": 86, "op": "decode attention", "width": 256, "rows": 512, "dtype": "float32", "bias": True},
    {"capability": 90, "op": "append to cache", "width": 64, "dtype": "bfloat16"},
    {"capability": 90, "op": "loss", "width": 32128, "dtype": "bfloat16", "smoothing": False, "gradient": True},
    {"capability": 80, "op": "loss", "width": 250112, "dtype": "bfloat16", "smoothing": True, "gradient": True},
]


def layer_variants(capabilities: list[int], combine: Callable[[list[list]], Iterable[tuple]] | None) -> Iterator[dict]:
    """What `combine` makes of the parts and the options of every operator; a few variants without it."""
    if combine is None:
        yield from FIRST
        return
    for op, options in OPTIONS.items():
        for capability, *values in combine([capabilities, *options.values()]):
            yield {"capability": capability, "op": op, **dict(zip(options, values, strict=True))}


def launch_layer(variant: dict) -> None:
    """Forward and backward of a variant."""
    dtype, width = getattr(torch, variant["dtype"]), variant["width"]
    p = 0.1 if variant.get("dropout") else 0.0
    seed = torch.zeros(1, dtype=torch.int64)
    early = variant["capability"] >= 90
    x = torch.zeros(8, width, dtype=dtype)
    if variant["op"] == "norm":
        kind, weight = variant["residual"], torch.zeros(width, dtype=dtype)
        hidden = x.float() if kind == "float32" else x
        branch = None if kind == "none" else x
        _, total, rstd = rms_norm.launch_forward(hidden, branch, weight, 1e-6, p, seed, dtype, early)
        total = hidden if branch is None else total
        rms_norm.launch_backward(
            x, branch, total, weight, rstd, p, seed, hidden.dtype, None if branch is None else dtype,
            dtype if variant["recompute"] else None,
        )  # fmt: skip
    elif variant["op"] == "activation":
        up = x if variant["gated"] else None
        gated_act.launch_forward(x, up, variant["act"], p, seed)
        gated_act.launch_backward(x, x, up, x, up, variant["act"], p, seed, x if variant["recompute"] else None)
    elif variant["op"] == "gated linear":
        weight = torch.zeros(2048, width, dtype=dtype)
        config = gated_linear.gated_linear_config(variant["rows"], variant["capability"])
        gated_linear.launch(x, weight, weight, variant["act"], config, early and variant["rows"] <= FEW_ROWS)
    elif variant["op"] == "few rows linear":
        weights = [torch.zeros(768, width, dtype=dtype)] * variant["weights"]
        few_rows.launch(x, weights, few_rows.few_rows_config(variant["rows"], width, variant["capability"]), early)
    elif variant["op"] == "decode attention":
        rows = variant["rows"]
        query, keys = torch.zeros(rows, 4, 1, width, dtype=dtype), torch.zeros(rows, 4, 300, width, dtype=dtype)
        bias = torch.zeros(1, 4, 1, 300, dtype=dtype) if variant["bias"] else None
        decode_attention.launch(query, keys, keys, bias, 1.0, early)
    elif variant["op"] == "append to cache":
        token, tokens = torch.zeros(8, 12, 1, width, dtype=dtype), torch.zeros(8, 12, 300, width, dtype=dtype)
        cache.launch_append(token, token, tokens, tokens, seed, seed, early)
    else:
        labels, rows = torch.zeros(8, dtype=torch.int64), new_rows(x, 8)
        smoothing = 0.1 if variant["smoothing"] else 0.0
        cross_entropy.launch_loss(x, labels, rows, -100, 1e-4, smoothing, 1.0 if variant["gradient"] else None)
        cross_entropy.launch_gradient(x, labels, rows.lse, rows.loss, x, -100, 1e-4, smoothing)
