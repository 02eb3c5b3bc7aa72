"""Continued pretraining on real text, measured: does it learn a new domain and a new language, and is nothing lost?

    python benchmarks/adapt_real_text.py DATA OUT

DATA holds `t5_spiece.model`, `wikitext2_test.txt`, `wikitext2_valid.txt`, `shakespeare.txt`, `french_novels.txt` and
`t5_mini_wiki/` (a stock T5 with learned weights). Two walks, each a few minutes on one core:

1. A small FAT5 is pretrained on WikiText-2 and continued on Shakespeare.
2. The stock T5 is converted, compared with itself on held-out text, continued on French novels, and exported.

Writes `result.json` and the runs with their pictures into OUT.
"""

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerBase, T5Tokenizer

from fat5.data import CorpusOptions, DataOptions
from fat5.model import FlashT5Config, FlashT5ForConditionalGeneration
from fat5.train.data import RunData, load_data
from fat5.train.held_out import mean_and_error, measure
from fat5.train.load import load_model, load_tokenizer
from fat5.train.options import EvaluationOptions, ModelOptions, OutputOptions, TrainingOptions
from fat5.train.recipe import Recipe
from fat5.train.run import pretrain
from fat5convert.cli import main as fat5convert

BATCH = 8


def recipe(model: Path, train: Path, held_out: Path, out: Path, steps: int, learning_rate: float) -> Recipe:
    """Describe a run with the published UL2 mixture at 128 tokens."""
    return Recipe(
        model=ModelOptions(path=str(model), dropout_rate=0.0),
        data=DataOptions(
            train=(CorpusOptions(files=(str(train),)),),
            evaluation=(CorpusOptions(files=(str(held_out),)),),
            max_input_length=128,
            max_target_length=128,
            cache=str(out.parent / "tokens"),
        ),
        training=TrainingOptions(
            steps=steps,
            batch_size=BATCH,
            micro_batch_size=BATCH,
            learning_rate=learning_rate,
            warmup_steps=steps // 10,
        ),
        evaluation=EvaluationOptions(every=steps // 4, examples=256, batch_size=BATCH),
        output=OutputOptions(folder=str(out), log_every=5, save_every=steps // 5 * 5),
    )


def split(text: Path, folder: Path) -> tuple[Path, Path]:
    """Write the last tenth of a text, cut between lines, to a file of its own: it is held out."""
    whole = text.read_text(encoding="utf-8")
    cut = whole.index("\n", len(whole) * 9 // 10)
    train, held_out = (folder / f"{text.stem}.{part}.txt" for part in ("train", "held_out"))
    train.write_text(whole[:cut], encoding="utf-8")
    held_out.write_text(whole[cut:], encoding="utf-8")
    return train, held_out


def fresh_model(vocabulary: Path, folder: Path) -> Path:
    """Write a FAT5 repo with fresh weights (T5 v1.0: tied) and T5's own tokenizer."""
    folder.mkdir(parents=True)
    shutil.copy(vocabulary, folder / "spiece.model")
    tokenizer: PreTrainedTokenizerBase = T5Tokenizer.from_pretrained(folder, extra_ids=100)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = FlashT5Config(d_model=128, d_kv=32, d_ff=256, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu")
    FlashT5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def figures(log: list[dict[str, Any]]) -> dict[str, Any]:
    """Take the held-out losses of a run, and by how many of their standard errors the last lies below the first."""
    evaluations = [entry for entry in log if "eval_loss" in entry]
    first, last = evaluations[0], evaluations[-1]
    error = max(first["eval_loss_se"], last["eval_loss_se"])
    return {
        "held_out_loss": {entry["step"]: entry["eval_loss"] for entry in evaluations},
        "standard_error": {entry["step"]: entry["eval_loss_se"] for entry in evaluations},
        "fall_in_standard_errors": (first["eval_loss"] - last["eval_loss"]) / error,
    }


def held_out_loss(model: torch.nn.Module, data: RunData) -> float:
    """Measure any seq2seq model on the fixed masks of a run."""
    items = [data.held_out[i] for i in range(len(data.held_out))]
    batches = [data.held_out_collator(items[i : i + BATCH]) for i in range(0, len(items), BATCH)]

    def forward(batch: Mapping[str, Tensor]) -> Tensor:
        return model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).logits

    examples = measure(forward, batches)
    return mean_and_error(examples.losses, examples.targets)[0]


def new_domain(data: Path, out: Path, steps: int) -> dict[str, Any]:
    """Pretrain on WikiText-2, continue on Shakespeare."""
    model = fresh_model(data / "t5_spiece.model", out / "fresh")
    wiki = recipe(model, data / "wikitext2_test.txt", data / "wikitext2_valid.txt", out / "wiki", 2 * steps, 5e-3)
    result = {"wikitext2": figures(pretrain(wiki))}
    train, held_out = split(data / "shakespeare.txt", out)
    shakespeare = recipe(out / "wiki" / "model", train, held_out, out / "shakespeare", steps, 3e-3)
    return result | {"shakespeare": figures(pretrain(shakespeare))}


def new_language(data: Path, out: Path, steps: int) -> dict[str, Any]:
    """Convert, compare, continue on French, export, compare."""
    stock, converted = data / "t5_mini_wiki", out / "converted"
    fat5convert([str(stock), str(converted)], standalone_mode=False)
    train, held_out = split(data / "french_novels.txt", out)
    wanted = recipe(converted, train, held_out, out / "french", steps, 3e-3)
    english = recipe(converted, train, data / "wikitext2_valid.txt", out / "unused", steps, 3e-3)
    losses = {}
    for name, described in (("french", wanted), ("english", english)):
        model = load_model(described.model).eval()
        windows = load_data(described, load_tokenizer(described.model, model.config), model.config.vocab_size, 1)
        oracle = AutoModelForSeq2SeqLM.from_pretrained(stock, dtype=torch.float32).eval()
        losses[name] = {"stock": held_out_loss(oracle, windows), "fat5": held_out_loss(model, windows)}
    result: dict[str, Any] = {"held_out_loss_before": losses, "french": figures(pretrain(wanted))}
    fat5convert(["export", str(out / "french" / "model"), str(out / "exported")], standalone_mode=False)
    windows = load_data(wanted, load_tokenizer(wanted.model, model.config), model.config.vocab_size, 1)
    exported = AutoModelForSeq2SeqLM.from_pretrained(out / "exported", dtype=torch.float32).eval()
    return result | {"held_out_loss_of_export": held_out_loss(exported, windows)}


@click.command()
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--steps", default=100, show_default=True, help="Length of each continuation.")
def main(data: Path, out: Path, steps: int) -> None:
    """Measure both walks on the texts in DATA and write result.json into OUT, which must not exist."""
    out.mkdir(parents=True)
    result: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "steps": steps}
    for walk in (new_domain, new_language):
        began = time.perf_counter()
        result[walk.__name__] = walk(data, out, steps) | {"seconds": round(time.perf_counter() - began)}
        (out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
