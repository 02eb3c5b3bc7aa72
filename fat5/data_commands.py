"""The commands of `fat5` that handle data: `tokenize`, `train-tokenizer`, and `data show`.

What is heavy to import is imported when a command runs, so that --help is quick.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

if TYPE_CHECKING:
    from fat5.data.options import CorpusOptions


@contextmanager
def _reported() -> Iterator[None]:
    """Turn what can be wrong with data into one message and exit code 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error


def _corpus_options(command: Any) -> Any:
    """Add the options that say what a corpus is."""
    for option in reversed(
        [
            click.argument("source", nargs=-1, required=True),
            click.option("--dataset", is_flag=True, help="SOURCE is one name, or folder, for `datasets`."),
            click.option("--format", "form", type=click.Choice(["text", "jsonl", "parquet"]), help="Default: by name."),
            click.option(
                "--documents",
                type=click.Choice(["blank_line", "line", "file"]),
                default="blank_line",
                show_default=True,
                help="What a document is in a text file.",
            ),
            click.option("--field", default="text", show_default=True, help="Key or column that holds the text."),
            click.option("--config", help="Configuration of the dataset."),
            click.option("--split", default="train", show_default=True, help="Split of the dataset."),
            click.option("--revision", help="Git revision of the dataset."),
            click.option("--streaming", is_flag=True, help="Read the dataset without downloading it first."),
            click.option("--replace-invalid", is_flag=True, help="Put U+FFFD for invalid UTF-8 instead of stopping."),
        ]
    ):
        command = option(command)
    return command


def _corpus(
    source: tuple[str, ...],
    dataset: bool,
    form: Any,
    documents: Any,
    field: str,
    config: str | None,
    split: str,
    revision: str | None,
    streaming: bool,
    replace_invalid: bool,
) -> CorpusOptions:
    from fat5.data.options import CorpusOptions

    if dataset and len(source) != 1:
        raise click.UsageError("--dataset takes one SOURCE")
    return CorpusOptions(
        files=() if dataset else source,
        dataset=source[0] if dataset else None,
        format=form,
        documents=documents,
        field=field,
        config=config,
        split=split,
        revision=revision,
        streaming=streaming,
        invalid_utf8="replace" if replace_invalid else "refuse",
    )


@click.command("tokenize")
@_corpus_options
@click.option("--tokenizer", required=True, help="Folder or Hub id of the tokenizer, or of the model it lies beside.")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder of the tokenised corpora. [default: user cache]")
@click.option("--num-proc", type=click.IntRange(1), default=1, show_default=True, help="Processes that encode.")
@click.option("--sentinels", default="auto", show_default=True, help="Sentinel family: t5, mt5, umt5, byt5 or auto.")
def tokenize(tokenizer: str, cache: Path | None, num_proc: int, sentinels: str, **corpus: Any) -> None:
    """Tokenise a corpus once, into memory-mapped shards that every later run finds.

    SOURCE are files (text, .jsonl, .parquet; patterns allowed) or, with --dataset, a name for `datasets`. What is
    there already, for the same text, tokenizer and options, is used again.
    """
    from fat5.data.load_tokenizer import load_tokenizer
    from fat5.data.special_ids import special_ids
    from fat5.data.token_store import tokenize_corpus

    with _reported():
        options = _corpus(**corpus)
        loaded = load_tokenizer(tokenizer)
        ids = special_ids(loaded, (), family=sentinels)
        begun = time.perf_counter()
        with tqdm(unit=" documents", unit_scale=True, desc="tokenising", disable=None) as bar:
            total = 0

            def progress(documents: int, tokens: int) -> None:
                nonlocal total
                total += tokens
                bar.set_postfix_str(f"{total} tokens", refresh=False)
                bar.update(documents)

            store = tokenize_corpus(options, loaded, ids, cache, processes=num_proc, progress=progress)
        made = f"in {time.perf_counter() - begun:.1f} s" if total else "found tokenised already"
    click.echo(f"{store.documents} documents, {store.tokens} tokens, {made}: {store.folder}")


@click.command("train-tokenizer")
@_corpus_options
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; must not exist.")
@click.option("--kind", type=click.Choice(["unigram", "bpe"]), default="unigram", show_default=True)
@click.option("--size", type=int, default=32100, show_default=True, help="Ids in all, special ones included.")
@click.option("--sentinels", type=click.IntRange(0), default=100, show_default=True, help="Number of <extra_id_N>.")
@click.option("--mode-tokens/--no-mode-tokens", default=True, show_default=True, help="Include [R], [S] and [X].")
@click.option("--byte-fallback/--no-byte-fallback", default=True, show_default=True, help="Bytes instead of <unk>.")
@click.option("--extend", help="Extend this tokenizer instead; a model beside it gets rows for the new pieces.")
@click.option("--new-pieces", type=click.IntRange(1), default=4000, show_default=True, help="With --extend: how many.")
def train_tokenizer(
    out: Path,
    kind: Any,
    size: int,
    sentinels: int,
    mode_tokens: bool,
    byte_fallback: bool,
    extend: str | None,
    new_pieces: int,
    **corpus: Any,
) -> None:
    """Train a tokenizer on a corpus, or extend an existing T5 tokenizer.

    The new tokenizer has T5's layout of ids. With --extend, ids that exist stay as they are, and each new embedding row
    is the mean of the rows of the pieces that spelt the new one before.
    """
    from fat5.data.documents import read_documents
    from fat5.data.extend_tokenizer import extend_tokenizer
    from fat5.data.load_tokenizer import load_tokenizer
    from fat5.data.save_tokenizer import save_tokenizer
    from fat5.data.train_tokenizer import train_tokenizer as make_tokenizer

    with _reported():
        if out.exists():
            raise ValueError(f"{out} exists already; choose another folder, or remove it")
        documents = read_documents(_corpus(**corpus))
        if extend is None:
            made = make_tokenizer(
                documents, kind, size, sentinels=sentinels, mode_tokens=mode_tokens, byte_fallback=byte_fallback
            )
            save_tokenizer(made, out)
            click.echo(f"{len(made)} ids ({kind}), {sentinels} sentinels: {out}")
            return
        made, parts = extend_tokenizer(load_tokenizer(extend), documents, new_pieces)
        kept = _extend_weights(extend, out, len(made), parts)
        save_tokenizer(made, out)
    click.echo(f"{len(parts)} new pieces, {len(made)} ids{', with the model' if kept else ''}: {out}")


def _extend_weights(path: str, out: Path, rows: int, parts: dict[int, list[int]]) -> bool:
    """Extend and write the FAT5 model beside a tokenizer, where there is one."""
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").exists():
        return False
    from transformers import PretrainedConfig

    from fat5.data.extend_tokenizer import extend_model
    from fat5.model.modeling_flash_t5 import FlashT5ForConditionalGeneration

    config, _ = PretrainedConfig.get_config_dict(path)
    if config.get("model_type") != "flash_t5":
        raise ValueError(
            f"{path} holds a model of type {config.get('model_type')}, not a FAT5 one; run `fat5convert {path} OUT`"
            " first, and extend OUT"
        )
    model = FlashT5ForConditionalGeneration.from_pretrained(path, dtype="auto")
    extend_model(model, rows, parts)
    model.save_pretrained(out)
    return True


@click.group("data")
def data() -> None:
    """Look at the data of a recipe."""


@data.command("show")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--set", "changes", multiple=True, metavar="A.B=C", help="Change a key of the recipe.")
@click.option("--examples", type=click.IntRange(0), default=2, show_default=True, help="Examples of each denoiser.")
@click.option("--batches", type=click.IntRange(1), default=1000, show_default=True, help="Batches for the statistics.")
def show(recipe: Path, changes: tuple[str, ...], examples: int, batches: int) -> None:
    """Print decoded examples of every denoiser of RECIPE, and statistics of its first batches."""
    from transformers import PretrainedConfig

    from fat5.data.load_tokenizer import load_tokenizer
    from fat5.data.setup import open_mixture, open_windows, streamed_batches, training_batches
    from fat5.data.show import describe_examples, describe_statistics
    from fat5.data.statistics import measure_batches
    from fat5.train.recipe import load_recipe

    with _reported():
        loaded = load_recipe(recipe, changes)
        tokenizer = load_tokenizer(loaded.model.path, loaded.model.revision)
        config, _ = PretrainedConfig.get_config_dict(loaded.model.path, revision=loaded.model.revision)
        mixture = open_mixture(loaded.data, loaded.mixture, tokenizer, config.get("vocab_size"))
        training = loaded.training
        per_step = training.batch_size // training.micro_batch_size  # however many processes share them
        sizes = {"batch_size": training.micro_batch_size, "batches_per_step": per_step, "seed": training.seed}
        if loaded.data.train[0].streaming:
            stream = streamed_batches(loaded.data, mixture, tokenizer, **sizes)
            window, budget = stream.window, stream.budget
            gathered = [batch for batch, _ in islice(stream.gathered(), batches)]
        else:
            windows = open_windows(loaded.data.train, loaded.data, mixture, tokenizer)
            made = training_batches(loaded.data, windows, mixture, steps=batches, **sizes)
            window, budget = windows.window, made.schedule.budget
            gathered = [made.gather(number) for number in range(batches)]
        form = loaded.data.packing
        figures = measure_batches(mixture, budget, form, gathered)
        for line in chain(
            describe_examples(mixture, gathered[0], training.seed, tokenizer, examples) if examples else (),
            describe_statistics(figures, mixture, form, window),
        ):
            click.echo(line)
