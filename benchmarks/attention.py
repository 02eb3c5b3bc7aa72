"""Measure attention with T5's bias against what else computes it, and against attention without a bias.

    python benchmarks/attention.py                        # everything (one GPU, about 5 minutes)
    python benchmarks/attention.py --head-dims 64 --lengths 1024 4096 --peers fat5_t5 cudnn_no_bias
    python benchmarks/attention.py --stored benchmarks/results/attention-nvidia-h200.json      # print and draw it again
    TRITON_INTERPRET=1 python benchmarks/attention.py     # toy sizes on a CPU: runs everything, times mean nothing

All on the same tensors in one run: bf16, `heads * head_dim = 768`, a constant number of tokens. Prints tables of rates,
of memory and of FAT5's ratios to its peers, and writes `attention-<device>.json` (figures, ratios, device, versions,
commit, date) and a picture to `benchmarks/results/`.

Forward and backward are captured in CUDA graphs, so that no launcher's speed is measured, and replayed with a cold L2;
backward is (forward and backward) minus forward, medians of each. FLOPs are counted as 4BHMND forward and 10BHMND
backward, half of that when causal. Memory is the peak of forward and backward beyond inputs, outputs and gradients.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

import torch
from measure import ON_GPU, describe, milliseconds
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fat5.model.ops_attention import INTERPRETED, attention
from fat5.model.ops_attention_bias import T5Bias, bias_line, expand_table

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "ops")]
if INTERPRETED:
    from triton_interpreter import mend

    mend()

RESULTS = Path(__file__).parent / "results"
WIDTH = 768
LENGTHS = [512, 1024, 2048, 4096, 16384, 32768]
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
Run = Callable[..., torch.Tensor]


def sdpa(*backends: SDPBackend) -> Callable[[bool], Run]:
    """Torch's attention, with T5's bias written out, or without a bias."""

    def build(causal: bool) -> Run:
        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            with sdpa_kernel(list(backends)):
                own_mask = bias is None and causal
                return scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=own_mask, scale=1.0)

        return run

    return build


def flex(causal: bool) -> Run:
    """`flex_attention`, compiled for these very shapes, with a learned number for every distance.

    That is its best case: the fewer entries share the gradient's atomic additions, the slower it is.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # else one size after another reaches the limit on recompilations

    @torch.compile(dynamic=False, fullgraph=True)
    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, line: torch.Tensor, mask: object | None
    ) -> torch.Tensor:
        length = q.shape[2]

        def biased(score, b, h, i, j):
            return score + line[h, j - i + length - 1]

        return flex_attention(q, k, v, score_mod=biased, block_mask=mask, scale=1.0)

    masks: dict[int, object] = {}

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, line: torch.Tensor) -> torch.Tensor:
        length = q.shape[2]
        if causal and length not in masks:
            masks[length] = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=q.device)
        return attend(q, k, v, line, masks.get(length))

    return run


def fat5(deterministic: bool = False) -> Callable[[bool], Run]:
    """This project's operator."""

    def build(causal: bool) -> Run:
        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
            t5 = None if table is None else T5Bias(table, bidirectional=not causal)
            return attention(q, k, v, bias=t5, causal=causal, deterministic=deterministic)

        return run

    return build


# name -> (what the bias is given as, how to build the function for a causal flag or not, longest sequence)
PEERS: dict[str, tuple[str | None, Callable[[bool], Run], int]] = {
    "fat5_t5": ("table", fat5(), 1 << 20),
    "fat5_t5_deterministic": ("table", fat5(deterministic=True), 1 << 20),
    "fat5_no_bias": (None, fat5(), 1 << 20),
    "cudnn_no_bias": (None, sdpa(SDPBackend.CUDNN_ATTENTION), 1 << 20),
    "flash2_no_bias": (None, sdpa(SDPBackend.FLASH_ATTENTION), 1 << 20),
    "efficient_no_bias": (None, sdpa(SDPBackend.EFFICIENT_ATTENTION), 1 << 20),
    "sdpa_dense_bias": ("dense", sdpa(SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH), 16384),
    "cudnn_dense_bias": ("dense", sdpa(SDPBackend.CUDNN_ATTENTION), 4096),
    "flex_learned_line": ("line", flex, 1 << 20),
}


def make_inputs(head_dim: int, length: int, tokens: int, causal: bool, form: str | None) -> list[torch.Tensor]:
    """Leaves q, k, v `[B, H, L, D]` (views of `[B, L, H, D]`), and the bias in its form."""
    batch, heads = max(1, tokens // length), WIDTH // head_dim
    shape = (batch, length, heads, head_dim)
    q, k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    leaves = [q * head_dim**-0.5, k, v]
    table = torch.randn(32, heads, device=DEVICE)
    buckets, left, right = bias_line(not causal, 32, 128)
    if form == "table":
        leaves.append(table.bfloat16())
    elif form == "line":
        distance = torch.arange(1 - length, length, device=DEVICE)
        leaves.append(expand_table(table, buckets.to(DEVICE))[:, distance.clamp(-left, right) + left])
    elif form == "dense":
        distance = torch.arange(length, device=DEVICE)[None, :] - torch.arange(length, device=DEVICE)[:, None]
        line = expand_table(table, buckets.to(DEVICE)).bfloat16()
        dense = line[:, distance.clamp(-left, right) + left][None]
        leaves.append(dense.masked_fill_(distance > 0, -torch.inf) if causal else dense)
    return [x.detach().requires_grad_() for x in leaves]


def extra_memory(run: Run, leaves: list[torch.Tensor], grad: torch.Tensor) -> int | None:
    """Peak bytes of forward and backward beyond inputs, output and gradients."""
    if not ON_GPU:
        return None
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = run(*leaves)
    torch.autograd.grad(out, leaves, grad)
    results = sum(x.numel() * x.element_size() for x in [out, *leaves])
    return torch.cuda.max_memory_allocated() - before - results


def measure(name: str, head_dim: int, length: int, tokens: int, causal: bool, rep: int) -> dict:
    """One peer at one size: times, rates, memory; or why there are none."""
    record = {"peer": name, "head_dim": head_dim, "length": length, "causal": causal}
    form, build, longest = PEERS[name]
    if length > longest:
        return record | {"skipped": f"not measured beyond {longest}"}
    leaves = make_inputs(head_dim, length, tokens, causal, form)
    grad = torch.randn_like(leaves[0])
    run = build(causal)
    try:
        memory = extra_memory(run, leaves, grad)
        forward = milliseconds(lambda: run(*(x.detach() for x in leaves)), rep)
        both = milliseconds(lambda: torch.autograd.grad(run(*leaves), leaves, grad), rep)
    except (RuntimeError, ValueError) as error:  # a backend that does not take these tensors says so
        return record | {"skipped": " ".join(str(error).split()[:30])}
    products = leaves[0].shape[0] * length * length * WIDTH * (0.5 if causal else 1.0)
    return record | {
        "batch": leaves[0].shape[0],
        "forward_ms": forward,
        "backward_ms": both - forward,
        "forward_tflops": 4 * products / forward / 1e9,
        "backward_tflops": 10 * products / (both - forward) / 1e9,
        "extra_memory_bytes": memory,
    }


def check_kernels() -> tuple[list[dict], list[str]]:
    """Resources of the kernels that were launched, and what is wrong with them: spills, say, or no room."""
    if not ON_GPU:
        return [], []
    from kernel_resources import MEASURED, SHARED_MEMORY, compiled_so_far, complaint

    major, minor = torch.cuda.get_device_capability()
    kernels, wrong = compiled_so_far(), []
    for kernel in kernels:
        if kernel["kernel"] in MEASURED and (about := complaint(kernel)):
            wrong.append(about)
        if kernel["shared"] > SHARED_MEMORY[10 * major + minor]:
            wrong.append(f"{kernel['kernel']} wants {kernel['shared']} bytes of shared memory")
    return kernels, wrong


def ratios(records: list[dict]) -> list[dict]:
    """How often faster `fat5_t5` is than each peer at each size, and what share of its extra memory it takes."""
    key = itemgetter("head_dim", "length", "causal")
    ours = {key(r): r for r in records if r["peer"] == "fat5_t5" and "forward_tflops" in r}
    found = []
    for r in records:
        own = ours.get(key(r))
        if own is None or r["peer"] == "fat5_t5" or "forward_tflops" not in r:
            continue
        ratio = {name: r[name] for name in ("peer", "head_dim", "length", "causal")}
        for way in ("forward", "backward"):
            ratio[way] = round(own[f"{way}_tflops"] / r[f"{way}_tflops"], 3)
        if r["extra_memory_bytes"]:
            ratio["extra_memory"] = round(own["extra_memory_bytes"] / r["extra_memory_bytes"], 4)
        found.append(ratio)
    return found


def print_tables(records: list[dict]) -> None:
    """For each head width, causal or not, tables with a row per peer and a column per length."""
    tables: list[tuple[str, list[dict], Callable[[dict], str]]] = [
        ("TFLOPS forward/backward", records, lambda r: f"{r['forward_tflops']:.4g}/{r['backward_tflops']:.4g}"),
        ("fat5_t5 is so often as fast, forward/backward", ratios(records), lambda r: f"{r['forward']}/{r['backward']}"),
    ]
    if any(r.get("extra_memory_bytes") for r in records):
        tables.append(("MiB of extra memory", records, lambda r: f"{r['extra_memory_bytes'] / 2**20:.1f}"))
    for head_dim, causal in sorted({(r["head_dim"], r["causal"]) for r in records}):
        for title, source, cell in tables:
            rows = [r for r in source if (r["head_dim"], r["causal"]) == (head_dim, causal) and "skipped" not in r]
            lengths = sorted({r["length"] for r in rows})
            print(f"\nhead_dim {head_dim}, {'causal' if causal else 'not causal'}: {title}")
            print(f"{'':24}" + "".join(f"{n:>13}" for n in lengths))
            for name in PEERS:
                cells = {r["length"]: cell(r) for r in rows if r["peer"] == name}
                if cells:
                    print(f"{name:24}" + "".join(f"{cells.get(n, '-'):>13}" for n in lengths), flush=True)


def draw(records: list[dict], device: str, path: Path) -> None:
    """Rates and memory over length: a row of plots for each head width, causal or not."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    quantities = {"forward, TFLOPS": ("forward_tflops", 1), "backward, TFLOPS": ("backward_tflops", 1)}
    if any(r.get("extra_memory_bytes") for r in records):
        quantities["extra memory, MiB"] = ("extra_memory_bytes", 2**20)
    rows = sorted({(r["head_dim"], r["causal"]) for r in records})
    size = (4.2 * len(quantities), 3.2 * len(rows))
    figure, axes = pyplot.subplots(len(rows), len(quantities), figsize=size, squeeze=False, sharex=True)
    lines: dict[str, Line2D] = {}
    for plots, (head_dim, causal) in zip(axes, rows, strict=True):
        for axis, (title, (quantity, unit)) in zip(plots, quantities.items(), strict=True):
            for name in PEERS:
                points = sorted((r["length"], r[quantity] / unit) for r in records if quantity in r
                                and (r["peer"], r["head_dim"], r["causal"]) == (name, head_dim, causal))  # fmt: skip
                if points:
                    style = "-" if name.startswith("fat5") else "--"
                    color = f"C{list(PEERS).index(name)}"  # the same in every plot
                    (lines[name],) = axis.plot(*zip(*points, strict=True), style, color=color, marker="o", markersize=3)
            axis.set_title(f"{title}, head_dim {head_dim}{', causal' if causal else ''}", fontsize=10)
            axis.set_xscale("log", base=2)
            if unit == 1:
                axis.set_ylim(bottom=0)
            else:
                axis.set_yscale("log")
            axis.grid(alpha=0.3)
    figure.suptitle(f"Attention on {device}, bf16")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.legend(lines.values(), lines, loc="lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=100)


def show(about: dict, records: list[dict], path: Path) -> None:
    """Store the figures and their ratios, print them, and draw them beside the file."""
    path.write_text(json.dumps(about | {"ratios": ratios(records), "records": records}, indent=1) + "\n")
    print_tables(records)
    draw(records, about["device"], path.with_suffix(".png"))


def main() -> None:
    """Measure, print, store and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128] if ON_GPU else [64])
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS if ON_GPU else [64])
    parser.add_argument("--causal", nargs="+", choices=("no", "yes"), default=["no", "yes"])
    parser.add_argument("--tokens", type=int, default=32768 if ON_GPU else 64)
    parser.add_argument("--rep", type=int, default=100, help="milliseconds of replays per figure")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no new measurement after this time")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--stored", type=Path, help="measure nothing: print and draw the figures of this file, add ratios"
    )
    arguments = parser.parse_args()
    if arguments.stored:
        about = json.loads(arguments.stored.read_text())
        show(about, about.pop("records"), arguments.stored)
        return
    start = time.monotonic()
    about, records = describe(), []
    device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower().split(",")[0]).strip("-")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"attention-{device}.json"
    for name in arguments.peers:
        for causal in arguments.causal:
            for head_dim in arguments.head_dims:
                for length in arguments.lengths:
                    if time.monotonic() - start < arguments.seconds:
                        records.append(
                            measure(name, head_dim, length, arguments.tokens, causal == "yes", arguments.rep)
                        )
        path.write_text(json.dumps(about | {"tokens": arguments.tokens, "records": records}, indent=1) + "\n")
    kernels, wrong = check_kernels()
    about |= {"tokens": arguments.tokens, "kernels": kernels}
    show(about, records, path)
    skipped = sorted({f"{r['peer']}: {r['skipped']}" for r in records if "skipped" in r})
    print("\n" + "\n".join([*skipped, *wrong, f"written: {path} and its picture"]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
