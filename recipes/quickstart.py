"""The whole walk on a small model, with nothing but this checkout: convert, verify, continue pretraining, export back.

Run by `make quickstart`; `python recipes/quickstart.py --help` says more. The steps are the very commands a user
types, so their output is what a user sees. No network and no data are needed: the text is the language reference that
every Python installation carries (`pydoc_data.topics`), and the T5 is a small one made on the spot.
"""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from fat5.train.signals import STOPPED

VOCAB_PIECES = 4000
SENTINELS = 100
HELD_OUT_EVERY = 10  # every tenth document is for evaluation
RECIPE = Path(__file__).with_name("quickstart.yaml")


def write_text(folder: Path) -> tuple[Path, Path]:
    """Write the prose of the Python reference, one document per line, as a training and a held-out file.

    The reference repeats paragraphs among its topics; each is kept once, so that nothing held out is trained on.
    """
    seen: set[str] = set()
    documents = []
    for topic in topics.values():
        paragraphs = (re.sub(r"\s+", " ", p).strip() for p in topic.split("\n\n"))
        fresh = [p for p in paragraphs if len(p) > 60 and p not in seen]
        seen.update(fresh)
        # A handful of paragraphs make a document, so that there are enough documents to hold some out.
        documents += [" ".join(fresh[i : i + 4]) for i in range(0, len(fresh), 4)]
    train, held_out = folder / "train.txt", folder / "held_out.txt"
    held_out.write_text("".join(d + "\n" for d in documents[::HELD_OUT_EVERY]), encoding="utf-8")
    rest = [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY]
    train.write_text("".join(d + "\n" for d in rest), encoding="utf-8")
    return train, held_out


def train_tokenizer(text: Path) -> PreTrainedTokenizerFast:
    """Train a Unigram tokenizer laid out as T5's: pad 0, eos 1, unk 2, sentinels last and counting down."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCAB_PIECES, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train([str(text)], trainer)
    sentinels = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    tokenizer.add_special_tokens(sentinels[::-1])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=sentinels,
    )


def write_stock_t5(folder: Path, text: Path) -> None:
    """Write a small stock T5 v1.1 folder (gated-gelu, head of its own, as FLAN-T5) with fresh weights."""
    tokenizer = train_tokenizer(text)
    config = T5Config(
        vocab_size=-(-len(tokenizer) // 128) * 128,  # padded as T5's own embedding is, which leaves free rows
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    # transformers 5 ties a fresh T5 even when asked not to; a head of its own has to be put there.
    model.lm_head.weight = torch.nn.Parameter(torch.randn(config.vocab_size, config.d_model) * config.d_model**-0.5)
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(folder: Path, *command: str) -> None:
    """Run one of the project's commands in `folder` as a user would, from this environment, and stop if it fails.

    A signal is the command's to answer, which takes it a while: Ctrl-C reaches it by itself, SIGTERM is passed on.
    """
    click.secho(f"\n$ {' '.join(command)}", bold=True)
    words = [str(Path(sys.executable).with_name(command[0])), *command[1:]]
    process: subprocess.Popen[bytes] | None = None
    early = False

    def pass_on(*_: object) -> None:
        nonlocal early
        if process is None:
            early = True
        else:
            process.terminate()

    answers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: pass_on}
    before = {number: signal.signal(number, answer) for number, answer in answers.items()}
    process = subprocess.Popen(words, cwd=folder)
    if early:
        process.terminate()
    status = process.wait()
    for number, answer in before.items():
        signal.signal(number, answer)
    if status == STOPPED:
        click.echo("The walk ends here, and would begin anew. This goes on with the run alone:", err=True)
        click.echo(f"    cd {shlex.quote(str(folder))} && {shlex.join(words)}", err=True)
        sys.exit(STOPPED)
    if status != 0:
        raise click.ClickException(f"`{command[0]}` ended with status {status}; see its message above")


class UntiedT5(T5ForConditionalGeneration):
    """Stock T5, with a head of its own.

    transformers 5 counts the head of every T5 among the tied weights, whatever config.json says, and where the file
    holds another it warns at length, with advice that would leave the embeddings out.
    """

    _tied_weights_keys = dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "shared.weight")


@torch.no_grad()
def largest_logit_difference(stock_folder: Path, fat5_folder: Path, text: Path) -> tuple[float, float]:
    """Return the largest |difference| of the logits of the two models on a padded batch, and the largest |logit|."""
    tokenizer = AutoTokenizer.from_pretrained(stock_folder)
    stock = UntiedT5.from_pretrained(stock_folder).eval()
    fat5 = AutoModelForSeq2SeqLM.from_pretrained(fat5_folder, trust_remote_code=True).eval()
    lines = text.read_text(encoding="utf-8").splitlines()
    batch = tokenizer([lines[0][:400], lines[1][:100]], padding=True, return_tensors="pt")
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    expected = stock(**inputs, decoder_input_ids=batch.input_ids[:, :32]).logits
    logits = fat5(**inputs, decoder_input_ids=batch.input_ids[:, :32]).logits
    return (logits - expected).abs().max().item(), expected.abs().max().item()


def held_out_losses(log: Path) -> list[float]:
    """Read the held-out losses of a run, first to last, from its log."""
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [e["eval_loss"] for e in entries if "eval_loss" in e]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default="quickstart")
def main(folder: Path) -> None:
    """Walk through FAT5 on a small model, leaving everything in FOLDER. An earlier walk there is replaced."""
    started = time.monotonic()
    transformers_logging.disable_progress_bar()
    if folder.exists() and not (folder / RECIPE.name).exists():
        raise click.ClickException(f"{folder} is there and holds no earlier walk; give the name of a new folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(RECIPE, folder)
    stock, fat5, exported = folder / "t5", folder / "fat5", folder / "t5_trained"
    trained = folder / "run" / "model"

    click.secho(f"In {folder}/: a stock T5 v1.1 with fresh weights (t5/), and text of the Python reference", bold=True)
    train, held_out = write_text(folder)
    write_stock_t5(stock, train)

    run(folder, "fat5convert", "t5", "fat5")
    run(folder, "fat5convert", "verify", "fat5", "--against", "t5")
    run(folder, "fat5", "pretrain", RECIPE.name)
    run(folder, "fat5convert", "export", "run/model", "t5_trained")

    converted_difference, largest = largest_logit_difference(stock, fat5, held_out)
    trained_difference, trained_largest = largest_logit_difference(exported, trained, held_out)
    losses = held_out_losses(folder / "run" / "log.jsonl")
    rows = [
        ("converted against stock", f"logits differ by at most {converted_difference:.1e} of {largest:.1f}"),
        ("held-out loss", f"{losses[0]:.3f} before, {losses[-1]:.3f} after continued pretraining"),
        (
            "export against trained",
            f"logits differ by at most {trained_difference:.1e} of {trained_largest:.1f}",
        ),
        ("stock T5", str(stock)),
        ("FAT5 repo", str(fat5)),
        ("trained FAT5 repo", str(trained)),
        ("back in stock transformers", str(exported)),
        ("picture of the loss", str(folder / "run" / "loss.png")),
        ("page of the run", str(folder / "run" / "report.html")),
        ("time", f"{time.monotonic() - started:.0f} s"),
    ]
    click.echo()
    for name, value in rows:
        click.echo(f"{click.style(f'{name:<28}', bold=True)}{value}")
    failures = []
    if converted_difference > 1e-4 * largest or trained_difference > 1e-4 * trained_largest:
        failures.append("the logits do not agree")
    if not losses[-1] < losses[0] - 0.5:
        failures.append("the loss did not fall clearly")
    if failures:
        raise click.ClickException(" and ".join(failures))


if __name__ == "__main__":
    main()
