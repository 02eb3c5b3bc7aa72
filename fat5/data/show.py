"""Print what a recipe makes of its data: decoded examples and statistics, for `fat5 data show`."""

from collections.abc import Iterator

import click
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from fat5.data.batches import Form, Gathered
from fat5.data.random_streams import example_keys
from fat5.data.span_corruption import Mixture
from fat5.data.special_ids import SpecialIds
from fat5.data.statistics import BatchStatistics

_COLOURS = ("red", "green", "yellow", "blue", "magenta", "cyan")
_SHOWN_TOKENS = 160


def describe_examples(
    mixture: Mixture, gathered: Gathered, seed: int, tokenizer: PreTrainedTokenizerBase, each: int
) -> Iterator[str]:
    """Give lines that show windows of a batch under every denoiser, sentinels and mode tokens coloured."""
    for number, name in enumerate(mixture.names):
        yield click.style(f"\n{name}  ({mixture.shares[number]:.4g} of the mixture)", bold=True)
        chosen = (number * each + np.arange(each)) % len(gathered.tokens)
        tokens = [gathered.tokens[i] for i in chosen.tolist()]
        lengths = np.array([len(t) for t in tokens], dtype=np.int64)
        keys = example_keys(seed, 0, gathered.index[chosen])
        plan = mixture.plan(keys, lengths, np.full(each, number, dtype=np.int64))
        inputs, labels = mixture.corrupt(tokens, plan)
        split_inputs = np.split(inputs, np.cumsum(plan.input_lengths)[:-1])
        split_labels = np.split(labels, np.cumsum(plan.label_lengths)[:-1])
        for its_input, its_label in zip(split_inputs, split_labels, strict=True):
            yield f"  input   {coloured(its_input, tokenizer, mixture.ids)}"
            yield f"  target  {coloured(its_label, tokenizer, mixture.ids)}"


def coloured(ids: NDArray[np.int64], tokenizer: PreTrainedTokenizerBase, special: SpecialIds) -> str:
    """Decode ids; sentinels in colours by number, mode tokens and EOS in reverse; long ones cut short."""
    sentinels = {int(s): n for n, s in enumerate(special.sentinels)}
    modes = {i: mode for mode, i in special.modes.items()}
    parts: list[str] = []
    text: list[int] = []

    def flush() -> None:
        if text:
            parts.append(str(tokenizer.decode(text)))
            text.clear()

    for token in ids[:_SHOWN_TOKENS].tolist():
        if token in sentinels:
            flush()
            parts.append(click.style(f"<{sentinels[token]}>", fg=_COLOURS[sentinels[token] % len(_COLOURS)], bold=True))
        elif token in modes or token == special.eos:
            flush()
            parts.append(click.style(modes.get(token, "EOS"), reverse=True))
        else:
            text.append(token)
    flush()
    left = len(ids) - _SHOWN_TOKENS
    return " ".join(parts) + (f" ... {left} more tokens" if left > 0 else "")


def describe_statistics(figures: BatchStatistics, mixture: Mixture, form: Form, window: int) -> Iterator[str]:
    """Give the lines of the report over many batches."""
    yield f"\n{figures.batches} batches, {figures.examples} examples, {int(figures.raw.sum())} raw tokens"
    yield f"window: {window} raw tokens; packing: {form}"
    yield f"{'tokens of an example':24} {'mean':>8} {'least':>6} {'median':>7} {'most':>6}"
    for name, lengths in (("raw", figures.raw), ("input", figures.inputs), ("target", figures.labels)):
        yield (f"  {name:22} {lengths.mean():8.1f} {lengths.min():6d} {int(np.median(lengths)):7d} {lengths.max():6d}")
    yield f"padding: input {figures.input_padding:.2%}, target {figures.label_padding:.2%}"
    if form != "none":
        yield f"token budget used: input {figures.budget_inputs:.2%}, target {figures.budget_labels:.2%}"
    yield f"{'denoiser':28} {'recipe':>8} {'found':>8} {'noise':>8}"
    for n, name in enumerate(mixture.names):
        its = figures.denoiser == n
        noise = figures.noise[its].sum() / max(figures.raw[its].sum(), 1)
        yield f"  {name:26} {mixture.shares[n]:8.4f} {its.mean():8.4f} {noise:8.4f}"
    yield f"  {'all':26} {1:8.4f} {1:8.4f} {figures.noise.sum() / figures.raw.sum():8.4f}"
