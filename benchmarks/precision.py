"""Continued pretraining in pure bf16, on real text: what Kahan summation and stochastic rounding are worth.

    python benchmarks/precision.py DATA OUT

DATA holds `wikitext2_test.txt`, `wikitext2_valid.txt` and `shakespeare.txt`. A small FAT5 with its own tokenizer is
pretrained on WikiText-2 in fp32. From those fp32 weights it is continued on Shakespeare, by the same recipe at a small
learning rate, as continued pretraining has it: in fp32, in bf16 autocast, and with bf16 weights whose updates are added
with Kahan summation, with stochastic rounding, and plainly. Writes `precision.json` and `precision.png` into OUT.
"""

import json
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from adapt_real_text import recipe, split
from matplotlib.figure import Figure

from fat5.data import CorpusOptions
from fat5.data.documents import read_documents
from fat5.data.train_tokenizer import train_tokenizer
from fat5.model import FlashT5Config, FlashT5ForConditionalGeneration
from fat5.train.figures import COLOURS
from fat5.train.recipe import Recipe
from fat5.train.run import pretrain

NAMES = {
    "fp32": "fp32",
    "bf16_kahan": "bf16 weights, Kahan",
    "bf16_nearest": "bf16 weights, plain",
    "bf16_stochastic": "bf16 weights, stochastic rounding",
    "bf16": "bf16 autocast, fp32 weights",
}


def fresh_model(text: Path, folder: Path) -> Path:
    """Write a FAT5 repo with fresh weights and a tokenizer trained on a text, small enough for a CPU."""
    documents = read_documents(CorpusOptions(files=(str(text),)))
    train_tokenizer(documents, "unigram", 1408, sentinels=100, mode_tokens=True).save_pretrained(folder)
    torch.manual_seed(0)
    config = FlashT5Config(
        vocab_size=1408, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    FlashT5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def scaled(base: Recipe, **changes: Any) -> Recipe:
    """Lay changes of the training section over a recipe that uses AdamWScale."""
    training = replace(base.training, optimizer="adamw_scale", schedule="constant_with_warmup", **changes)
    data = replace(base.data, max_input_length=64, max_target_length=64)
    evaluation = replace(base.evaluation, every=max(1, training.steps // 5), examples=128, samples=0)
    return replace(base, data=data, training=training, evaluation=evaluation)


def held_out(log: list[dict[str, Any]]) -> dict[int, float]:
    """Take the held-out losses out of a log, by step."""
    return {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the held-out losses of all precisions."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for colour, (key, run) in zip(COLOURS, result["runs"].items(), strict=False):
        steps, losses = zip(*((int(step), loss) for step, loss in run["held_out_loss"].items()), strict=True)
        label = f"{NAMES[key]}: {losses[-1]:.3f} ({run['against_fp32']:+.2%})"
        axes.plot(steps, losses, color=colour, marker="o", markersize=3.5, label=label)
    axes.set(
        xlabel="step",
        ylabel="held-out loss (nats per target token)",
        title="Continued on Shakespeare, from fp32 weights",
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


@click.command()
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--pretraining", default=600, show_default=True, help="Steps on WikiText-2.")
@click.option("--steps", default=150, show_default=True, help="Steps on Shakespeare.")
@click.option("--learning-rate", default=1e-3, show_default=True, help="On Shakespeare, relative to each weight's RMS.")
def main(data: Path, out: Path, pretraining: int, steps: int, learning_rate: float) -> None:
    """Measure all precisions on the texts in DATA; OUT must not exist."""
    out.mkdir(parents=True)
    model = fresh_model(data / "wikitext2_test.txt", out / "fresh")
    wiki = recipe(model, data / "wikitext2_test.txt", data / "wikitext2_valid.txt", out / "wiki", pretraining, 2e-2)
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "pretraining_steps": pretraining,
        "steps": steps,
        "learning_rate": learning_rate,
        "pretraining_held_out_loss": held_out(pretrain(scaled(wiki, warmup_steps=pretraining // 10))),
        "runs": {},
    }
    train, test = split(data / "shakespeare.txt", out)
    for precision in NAMES:
        began = time.perf_counter()
        continued = recipe(out / "wiki" / "model", train, test, out / precision, steps, learning_rate)
        losses = held_out(pretrain(scaled(continued, precision=precision, warmup_steps=steps // 10)))
        last = losses[max(losses)]
        reference = result["runs"].get("fp32", {"last": last})["last"]
        result["runs"][precision] = {
            "held_out_loss": losses,
            "last": last,
            "against_fp32": last / reference - 1,
            "seconds": round(time.perf_counter() - began),
        }
        (out / "precision.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw(json.loads((out / "precision.json").read_text(encoding="utf-8")), out / "precision.png")
    click.echo(json.dumps(result["runs"], indent=2))


if __name__ == "__main__":
    main()
