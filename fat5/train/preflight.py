"""`fat5 pretrain --dry-run`: what can be checked of a run in seconds, before a month of GPU time goes into it."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments

from fat5.data.batches import BatchDataset
from fat5.data.documents import DataError, corpus_files, read_documents
from fat5.data.options import CorpusOptions
from fat5.data.show import describe_examples
from fat5.model.modeling_flash_t5 import FlashT5ForConditionalGeneration
from fat5.train import checkpoints
from fat5.train.arguments import training_arguments
from fat5.train.continuation import require_same_run
from fat5.train.data import RunData, load_data
from fat5.train.errors import TrainingError
from fat5.train.flops import count
from fat5.train.folder import RunFolder
from fat5.train.load import add_rows, load_or_make
from fat5.train.recipe import Recipe
from fat5.train.report import device_name

_DOCUMENTS = 200  # of each corpus that are read
_BATCHES = 50  # among which the longest is looked for

# Bytes for each parameter: weights, gradients, optimizer state. AdamW's two moments are in the weights' format,
# AdamWScale's in fp32, with bf16 compensations for Kahan.
_WEIGHTS = {"fp32": 4, "bf16": 4, "bf16_kahan": 2, "bf16_stochastic": 2, "bf16_nearest": 2}


def preflight(recipe: Recipe) -> Iterator[str]:
    """Check a run, and tell of each thing that is in order; nothing is written to the output folder.

    Only the first documents of each corpus are read. What is checked: files, tokenizer against vocabulary, sentinels
    and mode tokens, disk space for the checkpoints, memory, and a forward and backward pass of a long batch, on the
    run's device. Then decoded examples of every denoiser.

    Raises:
        TrainingError: something is not in order; the message says what to change.
    """
    folder = RunFolder(Path(recipe.output.folder))
    if (last := checkpoints.newest(folder.checkpoints)) is not None:
        require_same_run(recipe, folder, last)
    args = training_arguments(recipe, folder, fresh=True)
    model, tokenizer = load_or_make(recipe)
    parameters = sum(p.numel() for p in model.parameters())
    yield f"model: {parameters:,} parameters, {model.config.vocab_size} embedding rows, {recipe.training.precision}"
    with tempfile.TemporaryDirectory() as cache:
        data = _sampled_data(recipe, Path(cache), tokenizer, model, args)
        yield _corpora(recipe)
        yield _tokenizer(data, tokenizer, model)
        add_rows(model, data.mixture.ids.rows)
        yield _disk(recipe, folder, parameters)
        yield _memory(recipe, args, parameters)
        yield _longest_batch(recipe, args, data, model)
        yield from describe_examples(data.mixture, _sampled_batches(data).gather(0), recipe.training.seed, tokenizer, 1)
    if last is not None:
        yield f"\nthe run would continue from {last}"


def _sampled_data(
    recipe: Recipe,
    cache: Path,
    tokenizer: PreTrainedTokenizerBase,
    model: FlashT5ForConditionalGeneration,
    args: TrainingArguments,
) -> RunData:
    """Load the data of a run that has no more than the first documents of each corpus."""

    def sampled(corpora: tuple[CorpusOptions, ...], kind: str) -> tuple[CorpusOptions, ...]:
        return tuple(_sample(corpus, cache / f"{kind}{i}.jsonl") for i, corpus in enumerate(corpora))

    data = recipe.data
    try:
        train, held_out = sampled(data.train, "train"), sampled(data.evaluation, "evaluation")
    except DataError as error:
        raise TrainingError(str(error)) from error
    short = replace(recipe, data=replace(data, train=train, evaluation=held_out, cache=str(cache)))
    return load_data(short, tokenizer, model.config.vocab_size, args.gradient_accumulation_steps * args.world_size)


def _sampled_batches(data: RunData) -> BatchDataset:
    assert isinstance(data.batches, BatchDataset), "what was sampled lies in files"
    return data.batches


def _sample(corpus: CorpusOptions, path: Path) -> CorpusOptions:
    """Copy the first documents of a corpus to a file; of a data set, without fetching all of it."""
    source = replace(corpus, streaming=True) if corpus.dataset is not None else corpus
    if not source.streaming:
        for file in corpus_files(source):
            if not os.access(file, os.R_OK):
                raise DataError(f"{file} may not be read; check its permissions")
    with path.open("w", encoding="utf-8") as written:
        for document in islice(read_documents(source), _DOCUMENTS):
            written.write(json.dumps({"text": document}) + "\n")
    return CorpusOptions(files=(str(path),), format="jsonl", weight=corpus.weight)


def _corpora(recipe: Recipe) -> str:
    named = ", ".join(corpus.name for corpus in (*recipe.data.train, *recipe.data.evaluation))
    return f"data: {named}: there, and the first {_DOCUMENTS} documents of each can be read"


def _tokenizer(data: RunData, tokenizer: PreTrainedTokenizerBase, model: FlashT5ForConditionalGeneration) -> str:
    ids, rows = data.mixture.ids, model.config.vocab_size
    modes = ", ".join(f"{mode} {i}" for mode, i in ids.modes.items()) or "none"
    sentinels = f"{len(ids.sentinels)} sentinels"
    if len(ids.sentinels):
        sentinels += f" ({ids.sentinels[0]} to {ids.sentinels[-1]})"
    grows = f"; the embedding grows from {rows} to {ids.rows} rows" if ids.rows > rows else ""
    return f"tokenizer: {ids.vocabulary} ids for {rows} rows, {sentinels}, mode tokens: {modes}{grows}"


def _optimizer_bytes(recipe: Recipe) -> int:
    training = recipe.training
    if training.optimizer == "adamw_scale":
        return 8 + (2 if training.precision == "bf16_kahan" else 0)
    return 2 * _WEIGHTS[training.precision]  # two moments, as AdamW; Adafactor and 8-bit optimizers need less


def _disk(recipe: Recipe, folder: RunFolder, parameters: int) -> str:
    weights = parameters * _WEIGHTS[recipe.training.precision]
    checkpoint = weights + parameters * _optimizer_bytes(recipe)
    if recipe.training.parallel == "fsdp":
        checkpoint += weights  # as a whole, and in parts beside the optimizer's state
    # One more than are kept, while a new one is being written; and the trained model.
    needed = (recipe.output.keep_checkpoints + 1) * checkpoint + weights
    there = next(path for path in (folder.root.absolute(), *folder.root.absolute().parents) if path.is_dir())
    if not os.access(there, os.W_OK):
        raise TrainingError(f"output.folder {folder.root}: {there} may not be written to")
    free = shutil.disk_usage(there).free
    what = f"{_size(checkpoint)} a checkpoint, {_size(needed)} in all, {_size(free)} free at {there}"
    if needed > free:
        raise TrainingError(f"disk: {what}; make room, choose another output.folder or lower output.keep_checkpoints")
    return f"disk: {what}"


def _memory(recipe: Recipe, args: TrainingArguments, parameters: int) -> str:
    training = recipe.training
    each = 2 * _WEIGHTS[training.precision] + _optimizer_bytes(recipe)
    shares = args.world_size if training.parallel == "fsdp" else 1
    needed = parameters * each // shares
    if args.device.type == "cuda":
        there = torch.cuda.get_device_properties(args.device).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    what = f"{_size(needed)} for weights, gradients and optimizer ({each} bytes a parameter), of {_size(there)} there"
    if needed > there:
        raise TrainingError(
            f"memory: {what}; take training.precision=bf16_kahan, training.parallel=fsdp on more GPUs, or a smaller"
            " model"
        )
    return f"memory: {what}; activations come on top"


def _longest_batch(
    recipe: Recipe, args: TrainingArguments, data: RunData, model: FlashT5ForConditionalGeneration
) -> str:
    """Run forward and backward of the longest of the first batches."""
    batches = _sampled_batches(data)
    found = [batches[number] for number in range(min(_BATCHES, len(batches)))]
    batch: dict[str, Any] = max(found, key=lambda b: count(b).places)
    counts = count(batch)
    torch.nn.Module.to(model, args.device).train()
    if recipe.training.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    inputs = {k: v.to(args.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items() if k != "denoiser"}
    began = time.perf_counter()
    with torch.autocast(args.device.type, torch.bfloat16, enabled=recipe.training.precision == "bf16"):
        loss = model(**inputs).loss
    loss.backward()
    value = loss.item()
    seconds = time.perf_counter() - began
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
    what = f"loss {value:.4f}, gradient norm {norm:.4g}"
    if not torch.tensor([value, norm]).isfinite().all():
        raise TrainingError(
            f"forward and backward on {device_name(args.device)}: {what}; the model or its data is damaged"
        )
    memory = ""
    if args.device.type == "cuda":
        memory = f", {_size(torch.cuda.max_memory_allocated(args.device))} at the peak without the optimizer"
    size = f"{counts.tokens} real of {counts.places} tokens"
    return f"longest of {len(found)} batches ({size}) on {device_name(args.device)}: {what}, {seconds:.2f} s{memory}"


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
