"""Raw text tokens per second that one core turns into UL2 batches, and how full packed batches are.

    OMP_NUM_THREADS=1 python benchmarks/ul2_data.py [--out benchmarks/results/ul2_data.json]

Documents of 100 to 2,000 random ids. The peer is a plain per-example port of T5's preprocessors (numpy, one window
after the other, padded to the batch), over the same windows; both are run in turn, and the median of the turns is
reported.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "data"))

import t5_preprocessors as t5
from corpora import make_store, random_documents
from denoising import T5_IDS

from fat5.data import (
    BatchDataset,
    CorpusOptions,
    DataOptions,
    Mixture,
    MixtureOptions,
    TokenStore,
    WindowDataset,
    training_batches,
)
from fat5.data.batches import build_batch
from fat5.data.statistics import measure_batches
from fat5.data.window_length import checked_window, stored_documents, window_that_packs

BUDGETS = ((512, 512), (1024, 256), (1024, 512))
TOKENS_PER_BATCH = 65536


def make_batches(
    store: TokenStore, mixture: Mixture, form: str, most: tuple[int, int], window: int | None
) -> BatchDataset:
    """Lay out batches of `TOKENS_PER_BATCH` input tokens."""
    options = DataOptions(
        train=(CorpusOptions(("unused",)),), max_input_length=most[0], max_target_length=most[1], packing=form
    )
    if window is None:
        if form == "segments":
            window = window_that_packs(stored_documents([store]), mixture, *most)
        else:
            window = checked_window(mixture, None, *most)
    rows = TOKENS_PER_BATCH // most[0]
    windows = WindowDataset([store], window)
    return training_batches(options, windows, mixture, batch_size=rows, batches_per_step=1, steps=10**9, seed=0)


def deliver(data: BatchDataset, first: int, count: int) -> int:
    """Build batches; give the raw tokens in them."""
    raw, schedule = 0, data.schedule
    for number in range(first, first + count):
        gathered = data.gather(number)
        build_batch(schedule.mixture, schedule.budget, data.form, gathered)
        raw += int(gathered.plan.lengths.sum())
    return raw


def deliver_by_port(windows: WindowDataset, mixture: Mixture, examples: int, rng: np.random.Generator) -> int:
    """Make one padded batch as T5's preprocessors do, an example at a time; give the raw tokens in it."""
    raw, sides = 0, ([], [])
    for index in rng.integers(len(windows), size=examples):
        tokens = np.asarray(windows[int(index)]["input_ids"])
        denoiser = mixture.denoisers[rng.choice(len(mixture.denoisers), p=mixture.shares)]
        mode = mixture.ids.modes[denoiser.mode] if denoiser.mode else None
        if denoiser.kind == "span":
            pair = t5.span_corruption(rng, tokens, denoiser.r, denoiser.mu, mixture.ids.sentinels, 1, mode)
        else:
            pair = t5.prefix_lm(rng, tokens, mixture.ids.sentinels, 1, mode, denoiser.sentinel)
        raw += len(tokens)
        for side, ids in zip(sides, pair, strict=True):
            side.append(ids)
    for side, fill in zip(sides, (0, -100), strict=True):
        padded = np.full((len(side), max(map(len, side))), fill, dtype=np.int64)
        for row, ids in zip(padded, side, strict=True):
            row[: len(ids)] = ids
        torch.from_numpy(padded)
    return raw


def rate(work: Callable[[], int], seconds: float) -> float:
    """Raw tokens per second of CPU time, over so many seconds: what others do on the core does not count."""
    begun, raw = time.process_time(), 0
    while (spent := time.process_time() - begun) < seconds:
        raw += work()
    return raw / spent


def measure(turns: int, seconds: float) -> dict[str, object]:
    """Measure speed and padding."""
    speeds, fills = [], []
    with tempfile.TemporaryDirectory() as folder:
        lengths = np.random.default_rng(0).integers(100, 2001, 20_000)
        store = make_store(Path(folder) / "store", random_documents(0, lengths), shards=4)
        ul2 = Mixture(MixtureOptions().resolved(), T5_IDS)
        for most in ((512, 512), (1024, 512)):
            for form in ("none", "segments", "stream"):
                data = make_batches(store, ul2, form, most, None)
                windows = data.schedule.windows
                rng = np.random.default_rng(1)
                place = [0]

                def ours(data: BatchDataset = data, place: list[int] = place) -> int:
                    place[0] += 4
                    return deliver(data, place[0] - 4, 4)

                def port(windows: WindowDataset = windows, rng: np.random.Generator = rng) -> int:
                    return deliver_by_port(windows, ul2, 64, rng)

                ours(), port()
                pairs = [(rate(ours, seconds), rate(port, seconds)) for _ in range(turns)]
                mine, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
                speeds.append(
                    {
                        "max_input_length": most[0],
                        "max_target_length": most[1],
                        "form": form,
                        "window": windows.window,
                        "million_tokens_per_second": round(mine / 1e6, 2),
                        "least": round(min(p[0] for p in pairs) / 1e6, 2),
                        "port_million_tokens_per_second": round(theirs / 1e6, 3),
                        "ratio": round(mine / theirs, 1),
                    }
                )
                print(speeds[-1], flush=True)
        for name in ("ul2_fat5", "ul2_paper", "t5_span_corruption", "prefix_lm"):
            mixture = Mixture(MixtureOptions(name).resolved(), T5_IDS)
            for most in BUDGETS:
                for form, window in (("segments", None), ("segments", 0), ("stream", None)):
                    chosen = checked_window(mixture, None, *most) if window == 0 else window
                    data = make_batches(store, mixture, form, most, chosen)
                    gathered = (data.gather(n) for n in range(100))
                    figures = measure_batches(mixture, data.schedule.budget, form, gathered)
                    fills.append(
                        {
                            "mixture": name,
                            "max_input_length": most[0],
                            "max_target_length": most[1],
                            "form": form,
                            "window": data.schedule.windows.window,
                            "padding_input": round(1 - figures.budget_inputs, 4),
                            "padding_target": round(1 - figures.budget_labels, 4),
                            "tensor_padding_input": round(figures.input_padding, 4),
                            "tensor_padding_target": round(figures.label_padding, 4),
                        }
                    )
                    print(fills[-1], flush=True)
    return {
        "what": "UL2 data, per second of CPU time of one thread; documents of 100 to 2,000 tokens",
        "mixture_of_speeds": "ul2_fat5",
        "input_tokens_per_batch": TOKENS_PER_BATCH,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "cpu": _cpu(),
        "turns": turns,
        "speed": speeds,
        "unfilled_budget": fills,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of each turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(options.turns, options.seconds)
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
