"""Compile the kernels for GPUs that are not there, and say what each one needs.

    python tests/ops/compile_kernels.py --cover first     # a handful of variants (what the tests run)
    python tests/ops/compile_kernels.py --cover pairs     # every pair of options occurs
    python tests/ops/compile_kernels.py --cover all       # every combination: hours
    python tests/ops/compile_kernels.py --ops layer       # the rest of the layer instead of attention

The launchers run as they are, on tensors of the CPU; only Triton's driver and the launches are replaced, so that what
is compiled is what would be launched. Prints one JSON object per variant; exits with 1 if a kernel does not compile,
wants more shared memory than its part has, or, in a configuration that should be fast, spills or waits too often.
"""

import argparse
import itertools
import json
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace

os.environ.pop("TRITON_INTERPRET", None)

import torch
from kernel_resources import SHARED_MEMORY, compiled_so_far, complaint, kernel_functions
from layer_launches import launch_layer, layer_variants
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fat5.model import ops_attention_backward, ops_attention_forward, ops_decode_attention_kernels
from fat5.model.ops_attention_bias import ALIBI_BIAS, DENSE_BIAS, T5_BIAS, BiasArgs, bias_line
from fat5.model.ops_attention_problem import Problem
from fat5.model.ops_attention_table import line_of_table, table_gradient

OPTIONS = {
    "capability": list(SHARED_MEMORY),
    "head_dim": [16, 32, 64, 80, 96, 128, 256],
    "dtype": ["bfloat16", "float16", "float32"],
    "bias": ["t5", "none", "alibi", "dense"],
    "causal": [False, True],
    "layout": ["padded", "lengths", "packed"],
    "dropout": [False, True],
    "deterministic": [False, True],
    "length": [16, 256, 8192],  # on every side of where other kernels or configurations take over
}
FIRST = [
    (90, 64, "bfloat16", "t5", False, "padded", False, False, 256),
    (90, 64, "bfloat16", "t5", False, "padded", False, False, 8192),
    (90, 128, "bfloat16", "t5", False, "padded", False, False, 256),
    (90, 128, "bfloat16", "t5", True, "packed", False, False, 256),
    (90, 128, "float16", "none", True, "padded", False, False, 256),
    (80, 64, "bfloat16", "t5", True, "packed", False, True, 256),
    (89, 128, "float32", "t5", False, "padded", False, True, 256),
    (100, 64, "float16", "alibi", True, "padded", True, False, 256),
]
TUNED = (90,)  # parts whose configurations were chosen by measuring
FAST_HEAD_DIMS = (64, 128)


class AbsentGPU:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def variants(cover: str, ops: str) -> Iterator[dict]:
    """Combinations of OPTIONS: the chosen few, enough for every pair, or all."""
    if ops == "layer":
        combine = {"first": None, "pairs": pairwise, "all": lambda columns: itertools.product(*columns)}[cover]
        yield from layer_variants(list(SHARED_MEMORY), combine)
        return
    if cover == "first":
        rows: Iterable[tuple] = FIRST
    elif cover == "all":
        rows = filter(possible, itertools.product(*OPTIONS.values()))
    else:
        rows = pairwise(list(OPTIONS.values()))
    for row in rows:
        yield dict(zip(OPTIONS, row, strict=True))


def possible(row: tuple) -> bool:
    """A dense bias has no packed form."""
    return not ("dense" in row and "packed" in row)


def pairwise(columns: list[list]) -> Iterator[tuple]:
    """Possible rows such that every possible pair of values of two columns occurs; greedy, always the same."""
    chance = random.Random(0)

    def pairs(row: tuple) -> set:
        return set(itertools.combinations(enumerate(row), 2))

    missing = {
        ((a, x), (b, y))
        for (a, xs), (b, ys) in itertools.combinations(enumerate(columns), 2)
        for x, y in itertools.product(xs, ys)
        if possible((x, y))
    }
    while missing:
        (a, x), (b, y) = min(missing, key=str)
        best: set = set()
        for _ in range(50):
            row = [chance.choice(values) for values in columns]
            row[a], row[b] = x, y
            if possible(tuple(row)) and len(pairs(tuple(row)) & missing) > len(best & missing):
                best, best_row = pairs(tuple(row)), tuple(row)
        missing -= best
        yield best_row


def compile_variant(variant: dict, launch: Callable[[dict], None]) -> list[dict]:
    """Run launchers with launching replaced by compiling; one record per kernel."""
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        run(self, *args, grid=grid, warmup=True, **kwargs)

    for function in kernel_functions():
        function.device_caches.clear()

    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    driver.set_active(AbsentGPU(variant["capability"]))
    ops_decode_attention_kernels.multiprocessors = lambda x: 132
    ops_attention_forward.compute_capability = ops_attention_backward.compute_capability = lambda x: variant[
        "capability"
    ]
    JITFunction.run = compile_only
    try:
        launch(variant)
    finally:
        JITFunction.run = run
    return compiled_so_far()


def launch_both(variant: dict) -> None:
    """Forward and backward of a small problem with the variant's options."""
    heads, length, d = 2, variant["length"], variant["head_dim"]
    packed = variant["layout"] == "packed"
    dtype = getattr(torch, variant["dtype"])
    q, k, v, out, grad = (torch.zeros(1 if packed else 2, length, heads, d, dtype=dtype) for _ in range(5))
    cu = torch.tensor([0, length // 2, length], dtype=torch.int32) if packed else None
    lengths = torch.tensor([length, length // 2], dtype=torch.int32) if variant["layout"] == "lengths" else None
    buckets, left, right = bias_line(not variant["causal"], 32, 128)
    table = torch.zeros(32, heads, dtype=dtype)
    bias = {
        "none": BiasArgs(),
        "t5": BiasArgs(T5_BIAS, line_of_table(table, buckets), left, right, exact_dtype=dtype),
        "alibi": BiasArgs(ALIBI_BIAS, slopes=torch.zeros(heads)),
        "dense": BiasArgs(DENSE_BIAS, dense=torch.zeros(2, heads, length, length, dtype=dtype)),
    }[variant["bias"]]
    problem = Problem(variant["causal"], 1.0, 0, 0.1 if variant["dropout"] else 0.0, length, length)
    seed = torch.zeros(1, dtype=torch.int64) if variant["dropout"] else None
    _, lse = ops_attention_forward.launch_forward(q, k, v, bias, cu, cu, lengths, problem, seed)
    *_, dline = ops_attention_backward.launch_backward(
        grad, q, k, v, out, lse, bias, cu, cu, lengths, problem, seed, variant["deterministic"]
    )
    if variant["bias"] == "t5":
        table_gradient(dline, buckets, table)


def complaints(variant: dict, kernels: list[dict]) -> list[str]:
    """What is wrong with a variant's kernels."""
    if "head_dim" not in variant:
        limit = SHARED_MEMORY[variant["capability"]]
        spills = [f"{kernel['kernel']} spills {kernel['stack']} bytes" for kernel in kernels if kernel["stack"]]
        return spills + [f"{k['kernel']} wants {k['shared']} bytes" for k in kernels if k["shared"] > limit]
    fast = variant["capability"] in TUNED and variant["head_dim"] in FAST_HEAD_DIMS and variant["dtype"] != "float32"
    fast = fast and variant["bias"] in ("t5", "none") and not (variant["dropout"] or variant["deterministic"])
    found = []
    for kernel in kernels:
        if kernel["shared"] > SHARED_MEMORY[variant["capability"]]:
            found.append(f"{kernel['kernel']} wants {kernel['shared']} bytes of shared memory")
        if fast and (about := complaint(kernel)):
            found.append(about)
    return found


def main() -> None:
    """Compile, print, and exit with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cover", choices=("first", "pairs", "all"), default="pairs")
    parser.add_argument("--ops", choices=("attention", "layer"), default="attention")
    parser.add_argument("--part", default="0/1", help="i/n: only every n-th variant, from the i-th")
    parser.add_argument("--list", action="store_true", help="print the variants and compile nothing")
    arguments = parser.parse_args()
    i, n = map(int, arguments.part.split("/"))
    wrong = 0
    launch = launch_layer if arguments.ops == "layer" else launch_both
    for variant in itertools.islice(variants(arguments.cover, arguments.ops), i, None, n):
        kernels = [] if arguments.list else compile_variant(variant, launch)
        found = complaints(variant, kernels)
        wrong += bool(found)
        print(json.dumps({**variant, "kernels": kernels, "wrong": found}), flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
