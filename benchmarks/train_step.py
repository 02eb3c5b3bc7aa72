"""Measure whole training steps, and encoder inference, of FlashT5 against stock `transformers` T5.

    python benchmarks/train_step.py                             # everything (one GPU, about 6 minutes)
    python benchmarks/train_step.py --parts train --cases base-512
    python benchmarks/train_step.py --parts padding ul2         # what padding costs, where a GPU is the limit
    python benchmarks/train_step.py                             # on a CPU: toy sizes, times mean nothing

A training step is forward, backward and fused AdamW in bf16, without dropout, on synthetic batches: full-length ones,
and for the cases that end in `-padded` rows of random lengths, whose padding FlashT5 removes. Stock runs in eager
attention under `torch.compile`, the fastest way it has; FlashT5 as it is and, where lengths are known, with the whole
of a step or call in a CUDA graph. For `padding`, FlashT5 alone meets batches so large that launching from Python does
not limit it, of whole rows and of rows that are padding from the middle on; for `ul2`, batches of UL2's mixture at 512
inputs and 512 targets, as they are and with every padded place taken for a token. MFU counts the multiplications of the
matrices and of attention, three times those of forward, against 989 TFLOPS; tokens are the real ones, of inputs and
targets. Writes `train-step-<device>.json` to `benchmarks/results/`, with the kernels that took most of FlashT5's time.
"""

import argparse
import gc
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import ON_GPU, describe, milliseconds
from torch import nn
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

from fat5.data import MIXTURES, DenoisingCollator, Mixture, SpecialIds, longest_window
from fat5.model import FlashT5Config, FlashT5EncoderModel, FlashT5ForConditionalGeneration

RESULTS = Path(__file__).parent / "results"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
PEAK = 989e12
SHAPES = {  # T5 v1.1
    "toy": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 256},
    "small": {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "vocab_size": 32128},
    "base": {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "vocab_size": 32128},
    "large": {"d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24, "num_heads": 16, "vocab_size": 32128},
    "xl": {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "vocab_size": 32128},
}
TRAIN = {  # model, rows, inputs, targets
    "small-512": ("small", 128, 512, 256),
    "base-512": ("base", 64, 512, 256),
    "base-1024": ("base", 32, 1024, 512),
    "large-512": ("large", 32, 512, 256),
    "base-4096": ("base", 8, 4096, 512),
    "base-512-padded": ("base", 64, 512, 256),
}
ENCODE = {"base-512": ("base", 64, 512), "xl-512": ("xl", 8, 512), "base-8192": ("base", 4, 8192)}
PADDING = {  # model, rows, inputs, targets; 0 targets for the encoder alone
    "encode-base": ("base", 512, 512, 0),
    "encode-large": ("large", 256, 512, 0),
    "train-base": ("base", 512, 512, 256),
    "train-large": ("large", 224, 512, 256),
}
UL2 = {"ul2-base": ("base", 256, 512), "ul2-large": ("large", 128, 512)}  # model, rows, inputs and targets at most
OPTIONS = {
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}


def batch(rows: int, inputs: int, targets: int, vocab: int, padded: bool) -> dict[str, torch.Tensor]:
    """Random tokens; if `padded`, of random lengths from a quarter of a row to all of it."""
    ids = torch.randint(2, vocab, (rows, inputs), device=DEVICE)
    labels = torch.randint(2, vocab, (rows, targets), device=DEVICE)
    made = {"input_ids": ids, "labels": labels}
    if padded:
        share = 0.25 + 0.75 * torch.rand(rows, 1, device=DEVICE)
        made["attention_mask"] = (torch.arange(inputs, device=DEVICE) < (share * inputs).long()).long()
        labels[torch.arange(targets, device=DEVICE) >= (share * targets).long()] = -100
    return made


def flops(shape: dict, lengths: list[tuple[int, int]]) -> float:
    """Of one training step over rows of (inputs, targets) tokens: 2 a multiplication, three times forward.

    Causal attention counts half, the embedding nothing, the head once.
    """
    d, inner, f = shape["d_model"], shape["d_kv"] * shape["num_heads"], shape["d_ff"]
    attention, ff, layers = 4 * d * inner, 3 * d * f, shape["num_layers"]
    total = 0
    for n, m in lengths:
        encoder = n * (attention + ff) + 2 * n * n * inner
        cross = 2 * m * d * inner + 2 * n * d * inner + 2 * n * m * inner
        decoder = m * (attention + ff) + m * m * inner + cross
        total += layers * (encoder + decoder) + m * d * shape["vocab_size"]
    return 6.0 * total


def build(peer: str, name: str, encoder: bool = False) -> nn.Module:
    """A randomly initialised bf16 model."""
    torch.manual_seed(0)
    implementation = {"attn_implementation": "fat5" if peer == "fat5" else "eager"}
    if peer == "fat5":
        config, cls = FlashT5Config, FlashT5EncoderModel if encoder else FlashT5ForConditionalGeneration
    else:
        config, cls = T5Config, T5EncoderModel if encoder else T5ForConditionalGeneration
    with torch.device(DEVICE):
        return cls(config(**SHAPES[name], **OPTIONS, **implementation)).to(torch.bfloat16)


def time_steps(step: Callable[[], object], seconds: float) -> float:
    """Milliseconds of one call, the mean over calls that follow each other for `seconds`."""
    for _ in range(3):
        step()
    if not ON_GPU:
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began, count = time.perf_counter(), 0
    start.record()
    while time.perf_counter() - began < seconds or count < 3:
        step()
        count += 1
        if count % 5 == 0:
            torch.cuda.synchronize()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / count


def top_kernels(step: Callable[[], object], count: int = 20) -> list[dict]:
    """The kernels that take most of a step, in microseconds."""
    if not ON_GPU:
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)[:count]
    return [{"kernel": e.key[:90], "calls": e.count, "us": round(e.self_device_time_total)} for e in events]


def measure_training(case: str, peer: str, seconds: float) -> dict:
    """One model on one kind of batch."""
    name, rows, inputs, targets = TRAIN.get(case, ("toy", 3, 20, 9))
    model = build(peer, name).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=ON_GPU, capturable=ON_GPU)
    made = batch(rows, inputs, targets, SHAPES[name]["vocab_size"], case.endswith("padded"))
    run = torch.compile(model) if peer == "stock" and ON_GPU else model

    def step() -> None:
        run(**made, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    ms = time_steps(step, seconds)
    masks = made.get("attention_mask", torch.ones(rows, inputs)), made["labels"] != -100
    lengths = list(zip(*(mask.sum(1).tolist() for mask in masks), strict=True))
    tokens = sum(map(sum, lengths))
    record = {
        "ms": ms,
        "tokens_per_second": tokens / ms * 1e3,
        "mfu": flops(SHAPES[name], lengths) / ms * 1e3 / PEAK,
        "peak_bytes": torch.cuda.max_memory_allocated() if ON_GPU else None,
    }
    if peer == "fat5":
        record["kernels"] = top_kernels(step)
        if not case.endswith("padded"):  # lengths are read back, which a graph cannot
            record["graph_ms"] = milliseconds(step, int(seconds * 1000))
            record["graph_mfu"] = record["mfu"] * ms / record["graph_ms"]
    return record


@torch.no_grad()
def measure_encoding(case: str, peer: str, seconds: float) -> dict:
    """Last hidden states of full rows."""
    name, rows, inputs = ENCODE.get(case, ("toy", 2, 20))
    model = build(peer, name, encoder=True).eval()
    ids = torch.randint(2, SHAPES[name]["vocab_size"], (rows, inputs), device=DEVICE)
    run = torch.compile(model) if peer == "stock" and ON_GPU else model
    shape = SHAPES[name]
    d, inner = shape["d_model"], shape["d_kv"] * shape["num_heads"]
    products = shape["num_layers"] * rows * inputs * (4 * d * inner + 3 * d * shape["d_ff"] + 2 * inputs * inner)
    ms = time_steps(lambda: run(ids), seconds)
    record = {"ms": ms, "tflops": 2 * products / ms / 1e9}
    if peer == "fat5":
        record["graph_ms"] = milliseconds(lambda: model(ids), int(seconds * 300))
        record["kernels"] = top_kernels(lambda: model(ids))
    return record


def measure_padding(case: str, peer: str, seconds: float) -> dict:
    """Last hidden states, or forward and backward, of whole rows and of rows half of which is padding."""
    name, rows, inputs, targets = PADDING.get(case, ("toy", 3, 20, 10))
    model = build(peer, name, encoder=not targets).train(bool(targets))
    made = batch(rows, inputs, targets, SHAPES[name]["vocab_size"], padded=False)
    if not targets:
        del made["labels"]

    def step() -> None:
        with torch.set_grad_enabled(bool(targets)):
            output = model(**made)
        if targets:
            output.loss.backward()
            model.zero_grad()

    record = {}
    for share in (1.0, 0.5):
        made["attention_mask"] = torch.ones_like(made["input_ids"])
        made["attention_mask"][:, int(share * inputs) :] = 0
        if targets:
            made["labels"][:, int(share * targets) :] = -100
        record["whole_ms" if share == 1 else "half_ms"] = time_steps(step, seconds)
    return record | {"half_of_whole": record["half_ms"] / record["whole_ms"]}


def ul2_batch(rows: int, longest: int, vocab: int) -> dict[str, torch.Tensor]:
    """Windows of random tokens, of documents of 100 to 2,000 as in `pretrain.py`, denoised by UL2's mixture."""
    denoisers, modes = MIXTURES["ul2_fat5"], {"[R]": vocab - 3, "[S]": vocab - 2, "[X]": vocab - 1}
    text = vocab - 3 - (100 if ON_GPU else 20)
    mixture = Mixture(denoisers, SpecialIds(np.arange(vocab - 4, text - 1, -1), modes, 1, 0, vocab, vocab))
    window, rng = longest_window(mixture, longest, longest), np.random.default_rng(0)
    lengths: list[int] = []
    while len(lengths) < rows:
        full, rest = divmod(int(rng.integers(100, 2000)), window)
        lengths += [window] * full + [rest] * (rest > 0)
    examples = [
        {"input_ids": rng.integers(2, text, length), "index": i, "epoch": 0}
        for i, length in enumerate(rng.permutation(lengths)[:rows])
    ]
    made = DenoisingCollator(mixture)(examples)
    return {name: made[name].to(DEVICE) for name in ("input_ids", "attention_mask", "labels")}


def measure_ul2(case: str, peer: str, seconds: float) -> dict:
    """Forward and backward of a batch with its padding removed, and of one of that size without padding."""
    name, rows, longest = UL2.get(case, ("toy", 6, 48))
    model = build(peer, name).train()
    vocab = SHAPES[name]["vocab_size"]
    made = ul2_batch(rows, longest, vocab)
    whole = {key: torch.randint(2, vocab, x.shape, device=DEVICE) for key, x in made.items() if key != "attention_mask"}
    whole["attention_mask"] = torch.ones_like(made["attention_mask"])

    def time(batch: dict[str, torch.Tensor]) -> float:
        def step() -> None:
            model(**batch).loss.backward()
            model.zero_grad()

        return time_steps(step, seconds)

    real = made["attention_mask"].sum() + (made["labels"] != -100).sum()
    record = {"real_tokens": int(real), "places": made["input_ids"].numel() + made["labels"].numel()}
    record |= {"removed_ms": time(made), "computed_ms": time(whole)}
    return record | {"computed_to_removed": record["computed_ms"] / record["removed_ms"]}


PARTS = {
    "train": (TRAIN, measure_training),
    "encode": (ENCODE, measure_encoding),
    "padding": (PADDING, measure_padding),
    "ul2": (UL2, measure_ul2),
}


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["train", "encode"])
    parser.add_argument("--cases", nargs="+", help="of all parts", choices=sorted({*TRAIN, *ENCODE, *PADDING, *UL2}))
    parser.add_argument("--peers", nargs="+", choices=("fat5", "stock"), default=["fat5", "stock"])
    parser.add_argument("--seconds", type=float, default=2.0, help="of calls behind each figure")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    about, records = describe(), []
    arguments.output.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower().split(",")[0]).strip("-")
    path = arguments.output / f"train-step-{device}.json"
    for peer in arguments.peers:
        for part, (cases, measure) in PARTS.items():
            for case in cases if ON_GPU else ["toy"]:
                if part in ("padding", "ul2") and peer != "fat5":
                    continue
                if part not in arguments.parts or (arguments.cases and case not in arguments.cases):
                    continue
                try:
                    figures = measure(case, peer, arguments.seconds)
                except torch.cuda.OutOfMemoryError as error:
                    figures = {"skipped": str(error).splitlines()[0][:200]}
                gc.collect()
                torch.cuda.empty_cache()
                torch._dynamo.reset()
                records.append({"part": part, "case": case, "peer": peer, **figures})
                path.write_text(json.dumps(about | {"peak_flops": PEAK, "records": records}, indent=1) + "\n")
                shown = {k: float(f"{v:.4g}") for k, v in figures.items() if isinstance(v, (int, float))}
                print(part, case, peer, shown or figures, flush=True)
    for record in records:
        if record.get("kernels"):
            print(f"\n{record['part']} {record['case']}: microseconds of the top kernels")
            print("\n".join(f"{k['us']:>9} {k['calls']:>5} x {k['kernel']}" for k in record["kernels"][:12]))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
