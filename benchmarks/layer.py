"""Measure the fused parts of a layer against what else computes them: norm, activation, and the head with its loss.

    python benchmarks/layer.py                            # everything (one GPU, about 3 minutes)
    python benchmarks/layer.py --parts norm --widths 768
    TRITON_INTERPRET=1 python benchmarks/layer.py         # toy sizes on a CPU: runs everything, times mean nothing

All in one run, bf16. Times are medians of CUDA graph replays, but for Liger's and Apple's losses, which read numbers
back and are launched one by one; backward is (forward and backward) minus forward. Rates count every input and output
once: `share` is the share of the bandwidth of a plain copy, measured in the same run.
Memory is the peak of forward and backward beyond inputs and returned gradients. Prints a table and writes
`layer-<device>.json` to `benchmarks/results/`.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import ON_GPU, describe, milliseconds, peak_memory
from torch.nn import functional as F

from fat5.model.ops_attention import INTERPRETED
from fat5.model.ops_cross_entropy import cross_entropy
from fat5.model.ops_gated_act import gated_act
from fat5.model.ops_linear_cross_entropy import linear_cross_entropy
from fat5.model.ops_rms_norm import add_rms_norm

try:
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy
except ImportError:
    cut_cross_entropy = None
try:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
except ImportError:
    LigerRMSNormFunction = LigerFusedLinearCrossEntropyFunction = None

if INTERPRETED:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from triton_interpreter import mend

    mend()

RESULTS = Path(__file__).parent / "results"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
EPS, Z_LOSS = 1e-6, 1e-4
Tensors = list[torch.Tensor]
Run = Callable[..., Any]


def leaves(*shapes: tuple[int, ...]) -> Tensors:
    """Random bf16 tensors that learn."""
    return [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for shape in shapes]


def copy_bandwidth(rep: int) -> float:
    """Bytes read and written a second by a plain copy of 2 GiB, the faster of the driver's and of a kernel's."""
    source = torch.randn((1 << 29) if ON_GPU else 1 << 18, device=DEVICE)
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    return 2 * source.numel() * source.element_size() / min(milliseconds(way, rep) for way in ways) * 1e3


def eager_norm(hidden: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor) -> Tensors:
    """As stock T5 adds and normalises."""
    hidden = hidden + branch
    normed = hidden * torch.rsqrt(hidden.float().square().mean(-1, keepdim=True) + EPS)
    return [weight * normed.to(weight.dtype), hidden]


def torch_norm(hidden: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor) -> Tensors:
    """`F.rms_norm` after an addition."""
    hidden = hidden + branch
    return [F.rms_norm(hidden, weight.shape, weight, EPS), hidden]


def liger_norm(hidden: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor) -> Tensors:
    """Liger-Kernel's after an addition."""
    hidden = hidden + branch
    return [LigerRMSNormFunction.apply(hidden, weight, EPS, 0.0, "llama", False), hidden]


def eager_act(joined: torch.Tensor) -> Tensors:
    """T5's gated GELU on both halves of one product."""
    x, up = joined.chunk(2, dim=-1)
    return [F.gelu(x, approximate="tanh") * up]


def eager_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> Tensors:
    """Logits, then cross-entropy and z-loss in fp32."""
    return eager_loss_of_logits(F.linear(hidden, weight), labels)


def eager_loss_of_logits(logits: torch.Tensor, labels: torch.Tensor) -> Tensors:
    """Cross-entropy and z-loss in fp32."""
    logits = logits.float()
    return [F.cross_entropy(logits, labels) + Z_LOSS * logits.logsumexp(-1).square().mean()]


def liger_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> Tensors:
    """Liger-Kernel's fused linear and cross-entropy."""
    return [LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels, None, None, -100, Z_LOSS)[0]]


def cut_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> Tensors:
    """Apple's fused linear and cross-entropy, which computes the logits tile by tile, twice. It has no z-loss."""
    return [cut_cross_entropy(hidden, weight, labels)]


def three_products(hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """The matrix products of head and gradients alone: what no form can do without."""
    logits = hidden @ weight.T
    torch.mm(logits, weight)
    torch.mm(logits.T, hidden)


def compiled(function: Run) -> Run:
    """By torch.compile, for these shapes; as it is where there is no GPU."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False) if ON_GPU else function


def time_both(run: Run, inputs: Tensors, extra: tuple[Any, ...], rep: int, graph: bool = True) -> dict:
    """Forward and backward times, and memory, of a function that returns tensors."""
    try:
        outputs = run(*inputs, *extra)
        grads = [torch.randn_like(y) for y in outputs]

        def both() -> None:
            torch.autograd.grad(run(*inputs, *extra), inputs, grads)

        detached = [x.detach() for x in inputs]
        del outputs
        peak = peak_memory(both)
        forward = milliseconds(lambda: run(*detached, *extra), rep, graph)
        total = milliseconds(both, rep, graph)
    except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
        return {"skipped": str(error).splitlines()[0][:200]}
    results = sum(x.numel() * x.element_size() for x in inputs)
    return {
        "forward_ms": forward,
        "backward_ms": total - forward,
        "total_ms": total,
        "extra_bytes": None if peak is None else peak - results,
    }


def with_rates(record: dict, forward_bytes: int, backward_bytes: int, copy: float) -> dict:
    """The record with rates, and their share of a copy's."""
    for way, count in (("forward", forward_bytes), ("backward", backward_bytes)):
        if f"{way}_ms" in record:
            record[f"{way}_tb_s"] = count / record[f"{way}_ms"] / 1e9
            record[f"{way}_share"] = record[f"{way}_tb_s"] * 1e12 / copy
    return record


def measure_norm(widths: list[int], tokens: int, rep: int, copy: float, peers: list[str]) -> Iterator[dict]:
    """Residual sum and RMSNorm: both outputs, and gradients of both inputs."""
    runs = {"fat5": add_rms_norm_run, "eager": eager_norm, "torch": torch_norm, "compiled": eager_norm}
    if LigerRMSNormFunction is not None:
        runs["liger"] = liger_norm
    for width in widths:
        inputs = leaves((tokens, width), (tokens, width), (width,))
        for peer in filter(runs.__contains__, peers):
            run = compiled(runs[peer]) if peer == "compiled" else runs[peer]
            record = with_rates(time_both(run, inputs, (), rep), 8 * tokens * width, 8 * tokens * width, copy)
            yield {"part": "norm", "peer": peer, "tokens": tokens, "width": width, **record}


def add_rms_norm_run(hidden: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """This project's norm."""
    return add_rms_norm(hidden, branch, weight, EPS)


def measure_act(widths: list[int], tokens: int, rep: int, copy: float, peers: list[str]) -> Iterator[dict]:
    """Gated GELU on the joined output of wi_0 and wi_1."""
    runs = {"fat5": lambda x: [gated_act(x, "gelu_new")], "eager": eager_act, "compiled": eager_act}
    for width in widths:
        inputs = leaves((tokens, 2 * width))
        for peer in filter(runs.__contains__, peers):
            run = compiled(runs[peer]) if peer == "compiled" else runs[peer]
            record = with_rates(time_both(run, inputs, (), rep), 6 * tokens * width, 10 * tokens * width, copy)
            yield {"part": "act", "peer": peer, "tokens": tokens, "width": width, **record}


def measure_loss(vocabs: list[int], tokens: int, rep: int, peers: list[str], width: int) -> Iterator[dict]:
    """The head with its loss, and the loss of given logits."""
    fused = {
        "fat5": lambda h, w, y: [linear_cross_entropy(h, w, y, z_loss=Z_LOSS).loss],
        "eager": eager_loss,
        "compiled": eager_loss,
    }
    if LigerFusedLinearCrossEntropyFunction is not None:
        fused["liger"] = liger_loss
    if cut_cross_entropy is not None:
        fused["cut"] = cut_loss
    given = {
        "fat5": lambda x, y: [cross_entropy(x, y, z_loss=Z_LOSS).loss],
        "eager": eager_loss_of_logits,
        "compiled": eager_loss_of_logits,
    }
    for vocab in vocabs:
        labels = torch.randint(vocab, (tokens,), device=DEVICE)
        about = {"tokens": tokens, "width": width, "vocab": vocab}
        inputs = leaves((tokens, width), (vocab, width))
        detached = [x.detach() for x in inputs]
        yield {
            "part": "loss", "peer": "products", **about,
            "total_ms": milliseconds(partial(three_products, *detached), rep),
        }  # fmt: skip
        for peer in filter(fused.__contains__, peers):
            if peer == "eager" and vocab > 100_000:
                continue  # 70 GB
            run = compiled(fused[peer]) if peer == "compiled" else fused[peer]
            graph = peer not in ("liger", "cut")
            yield {"part": "loss", "peer": peer, **about, **time_both(run, inputs, (labels,), rep, graph)}
        if vocab > 100_000:
            continue
        logits = leaves((tokens, vocab))
        for peer in filter(given.__contains__, peers):
            run = compiled(given[peer]) if peer == "compiled" else given[peer]
            yield {"part": "given logits", "peer": peer, **about, **time_both(run, logits, (labels,), rep)}


def print_record(record: dict) -> None:
    """One line."""
    size = record.get("vocab", record["width"])
    if "skipped" in record:
        print(f"{record['part']:13}{record['peer']:10}{size:>7}  {record['skipped']}", flush=True)
        return
    cells = [f"{record[name]:9.3f} ms" for name in ("forward_ms", "backward_ms", "total_ms") if name in record]
    cells += [f"{100 * record[name]:5.1f} %" for name in ("forward_share", "backward_share") if name in record]
    if record.get("extra_bytes") is not None:
        cells.append(f"{record['extra_bytes'] / 2**20:8.0f} MiB")
    print(f"{record['part']:13}{record['peer']:10}{size:>7}" + "".join(cells), flush=True)


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=("norm", "act", "loss"), default=["norm", "act", "loss"])
    parser.add_argument("--peers", nargs="+", default=["fat5", "eager", "torch", "compiled", "liger", "cut"])
    parser.add_argument("--widths", nargs="+", type=int, default=[512, 768, 1024, 2048, 4096] if ON_GPU else [24])
    parser.add_argument("--inner-widths", nargs="+", type=int, default=[1024, 2048, 2816, 5120] if ON_GPU else [24])
    parser.add_argument("--vocabs", nargs="+", type=int, default=[32128, 250112] if ON_GPU else [97])
    parser.add_argument("--rep", type=int, default=100, help="milliseconds of replays per figure")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    about, copy = describe(), copy_bandwidth(arguments.rep)
    print(f"{about['device']}: copy {copy / 1e12:.2f} TB/s. Forward, backward, both, shares of the copy, memory")
    tokens, loss_tokens, width = (65536, 16384, 768) if ON_GPU else (4, 4, 8)
    path = (
        arguments.output / f"layer-{re.sub(r'[^a-z0-9]+', '-', about['device'].lower().split(',')[0]).strip('-')}.json"
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    measured = {
        "norm": lambda: measure_norm(arguments.widths, tokens, arguments.rep, copy, arguments.peers),
        "act": lambda: measure_act(arguments.inner_widths, tokens, arguments.rep, copy, arguments.peers),
        "loss": lambda: measure_loss(arguments.vocabs, loss_tokens, arguments.rep, arguments.peers, width),
    }
    records = []
    for part in arguments.parts:
        for record in measured[part]():
            print_record(record)
            records.append(record)
            path.write_text(json.dumps(about | {"copy_tb_s": copy / 1e12, "records": records}, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
