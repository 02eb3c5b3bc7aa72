"""The arithmetic of denoising: how much is masked, where, and how input and target are written.

Everything works on a whole batch of ragged examples at once. `plan` decides the denoiser and the exact
lengths of every example from its key alone, without touching tokens, so that packing can be planned cheaply;
`corrupt` then writes the tokens.

The rules are those of T5's preprocessors (`random_spans_noise_mask`, `noise_span_to_unique_sentinel`,
`nonnoise_span_to_unique_sentinel`, `random_prefix_noise_mask` in
google-research/text-to-text-transfer-transformer, Apache-2.0), with two differences. Spans never outnumber
the sentinels: the noise count stays, the spans get longer. And when the random roll puts a masked span at the
very start, that span still gets its sentinel in the target, so that sentinel k of the input always stands for
what follows sentinel k of the target.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fat5.data import random_streams
from fat5.data.denoisers import Denoiser
from fat5.data.random_streams import Keys
from fat5.data.special_ids import SpecialIds

Ints = NDArray[np.int64]

# Counters and labels within an example's random stream.
_CHOICE, _ROLL, _CUT = 0, 1, 2
_MASKED_SPANS, _KEPT_SPANS = 1, 2


def noise_counts(lengths: Ints, r: NDArray[np.float32], mu: NDArray[np.float32], most_spans: int) -> tuple[Ints, Ints]:
    """Count masked tokens and masked spans of each window, as T5 does (in fp32, halves rounded to even).

    Args:
        lengths: [B] tokens.
        r: [B] share of masked tokens.
        mu: [B] mean length of a masked span.
        most_spans: spans are capped at this number.

    Returns:
        [B] masked tokens, and [B] spans before the roll. Both 0 for windows of fewer than two tokens.
    """
    length = np.maximum(lengths, 2)
    noise = np.rint(length.astype(np.float32) * r).astype(np.int64)
    noise = np.clip(noise, 1, length - 1)
    spans = np.rint(noise.astype(np.float32) / mu).astype(np.int64)
    spans = np.clip(spans, 1, np.minimum(np.minimum(noise, length - noise), most_spans))
    long_enough = lengths >= 2
    return noise * long_enough, spans * long_enough


class Mixture:
    """Denoisers as arrays, ready to be drawn from.

    Args:
        denoisers: the mixture; proportions need not sum to 1.
        ids: the special ids of the run.
        random_roll: turn every span mask by a random offset.

    Raises:
        ValueError: there are no denoisers, or too few sentinels for span corruption.
    """

    def __init__(self, denoisers: Sequence[Denoiser], ids: SpecialIds, random_roll: bool = True) -> None:
        if not denoisers:
            raise ValueError("the mixture has no denoisers")
        self.denoisers = tuple(denoisers)
        self.names = [d.name for d in denoisers]
        self.ids = ids
        self.random_roll = random_roll
        self.is_text = np.ones(ids.vocabulary, dtype=bool)
        self.is_text[[i for i in ids.reserved if i < ids.vocabulary]] = False
        # After the roll a mask may have one span more, and a target one sentinel more (the final one).
        self.most_spans = len(ids.sentinels) - int(random_roll)
        if any(d.kind == "span" for d in denoisers) and self.most_spans < 1:
            raise ValueError(f"span corruption needs at least 2 sentinels, and there are {len(ids.sentinels)}")
        proportions = np.array([d.proportion for d in denoisers])
        self.shares = proportions / proportions.sum()
        self._edges = np.cumsum(self.shares)[:-1]
        self._r = np.array([d.r for d in denoisers], dtype=np.float32)
        self._mu = np.array([d.mu for d in denoisers], dtype=np.float32)
        self._is_span = np.array([d.kind == "span" for d in denoisers])
        self._prefix = np.array([d.prefix or 0.0 for d in denoisers])
        self._sentinel = np.array([d.kind == "span" or d.sentinel for d in denoisers])
        self._mode = np.array([ids.modes[d.mode] if d.mode else -1 for d in denoisers], dtype=np.int64)

    def choose(self, keys: Keys) -> Ints:
        """Draw a denoiser for each key: [B] indices into `denoisers`."""
        return np.searchsorted(self._edges, random_streams.uniform(keys, _CHOICE), side="right")

    def plan(self, keys: Keys, lengths: Ints, denoiser: Ints | None = None) -> "Plan":
        """Decide how each window is corrupted, and with it the exact lengths of input and target.

        Args:
            keys: [B] random streams.
            lengths: [B] raw tokens of the windows; 0 is allowed.
            denoiser: [B] which denoiser; None draws from the mixture.
        """
        which = self.choose(keys) if denoiser is None else denoiser
        is_span, sentinel = self._is_span[which], self._sentinel[which]
        noise, spans = noise_counts(lengths, self._r[which], self._mu[which], max(self.most_spans, 1))
        kept = lengths - noise
        cut = np.zeros_like(lengths)
        if self.random_roll:
            cut = random_streams.below(keys, _ROLL, np.maximum(lengths, 1))
        else:
            cut = np.maximum(kept - spans, 0)  # the first kept start: no turn
        # See `_turned_spans`: where the mask is cut decides whether it starts and ends inside a masked span.
        splits = is_span & (cut >= kept + spans) & (spans > 0)
        ends_masked = (cut >= kept - spans) & (cut < kept) | splits

        prefix = np.rint(lengths * self._prefix[which]).astype(np.int64)
        drawn = 1 + random_streams.below(keys, _CUT, np.maximum(lengths - 1, 1))
        prefix = np.where(self._prefix[which] > 0, np.maximum(prefix, 1), drawn)
        prefix = np.minimum(prefix, np.maximum(lengths - 1, 0))

        some = lengths > 0
        noise = np.where(is_span, noise, lengths - prefix)
        spans = np.where(is_span, spans, some & sentinel)
        input_sentinels = spans + splits
        # T5 ends a target with one more sentinel when the window ends in kept text.
        final = np.where(is_span & some & ~splits, ~ends_masked | (spans == 0), False)
        label_sentinels = input_sentinels + final
        has_mode = self._mode[which] >= 0
        return Plan(
            keys=keys,
            lengths=lengths,
            denoiser=which,
            noise=noise,
            spans=spans,
            cut=cut,
            input_lengths=lengths - noise + input_sentinels + has_mode + 1,
            label_lengths=noise + label_sentinels + 1,
        )

    def corrupt(self, tokens: Sequence[NDArray[np.integer]], plan: "Plan") -> tuple[Ints, Ints]:
        """Write inputs and targets.

        Args:
            tokens: the raw windows, of the plan's lengths.
            plan: what `plan` decided for them.

        Returns:
            Inputs and targets, each one flat int64 array, example after example (`Plan.input_lengths`,
            `Plan.label_lengths`). Inputs: mode token, kept text with a sentinel for each masked span, EOS.
            Targets: masked spans, each behind its sentinel, a last sentinel if the window ends in kept text,
                EOS.
        """
        lengths = plan.lengths
        size = lengths + 2  # one slot before the text and one behind it
        first = np.cumsum(size) - size
        last = first + size - 1
        total = int(size.sum())
        text = np.empty(total, dtype=np.int64)
        for start, window in zip((first + 1).tolist(), tokens, strict=True):
            text[start : start + len(window)] = window

        example, start, stop = self._masked_spans(plan)
        begin, end = first[example] + 1 + start, first[example] + 1 + stop
        step = np.zeros(total + 1, dtype=np.int8)
        step[begin] = 1
        step[end] -= 1
        masked = np.cumsum(step[:-1], dtype=np.int8).view(bool)
        sentinel = self._sentinel[plan.denoiser]
        mode = self._mode[plan.denoiser]

        # Where the sentinels go: in the input on the first token of a masked span, in the target on the first
        # token of a kept one; a window that begins masked has an empty kept span in the slot before it.
        marked = begin[sentinel[example]]
        opens = first + 1 - masked[np.minimum(first + 1, last)]
        kept_on = np.sort(
            np.concatenate([opens[(lengths > 0) & sentinel], end[(end < last[example]) & sentinel[example]]])
        )

        keep = ~masked
        keep[first] = mode >= 0
        keep[marked] = True
        covered = text[marked]
        text[marked] = self.ids.sentinels[_ranks(marked, first)]
        text[first] = mode
        text[last] = self.ids.eos
        inputs = text[keep]

        text[marked] = covered
        text[kept_on] = self.ids.sentinels[_ranks(kept_on, first)]
        masked[last] = True
        masked[kept_on] = True
        return inputs, text[masked]

    def _masked_spans(self, plan: "Plan") -> tuple[Ints, Ints, Ints]:
        """Place every masked span: its example, start and stop within the window; example after example,
        ascending.
        """
        is_span = self._is_span[plan.denoiser]
        prefixed = np.flatnonzero(~is_span & (plan.lengths > 0))
        spanned = np.flatnonzero(is_span & (plan.spans > 0))
        example, start, stop = _turned_spans(
            plan.keys[spanned],
            plan.lengths[spanned],
            plan.noise[spanned],
            plan.spans[spanned],
            plan.cut[spanned],
        )
        example = np.concatenate([spanned[example], prefixed])
        start = np.concatenate([start, (plan.lengths - plan.noise)[prefixed]])
        stop = np.concatenate([stop, plan.lengths[prefixed]])
        order = np.lexsort((start, example))
        return example[order], start[order], stop[order]


@dataclass(frozen=True)
class Plan:
    """How each window of a batch is corrupted; every field is [B].

    Attributes:
        keys: random streams.
        lengths: raw tokens.
        denoiser: index into the mixture.
        noise: masked tokens.
        spans: masked spans before the roll (`span`); 1 or 0, whether there is a sentinel (`prefix`).
        cut: where the mask is cut open by the roll, see `_turned_spans`.
        input_lengths: tokens of the input, mode token and EOS included.
        label_lengths: tokens of the target, EOS included.
    """

    keys: Keys
    lengths: Ints
    denoiser: Ints
    noise: Ints
    spans: Ints
    cut: Ints
    input_lengths: Ints
    label_lengths: Ints

    def take(self, order: Ints) -> "Plan":
        """Give the plan of some of the examples, in the order given."""
        return Plan(**{name: value[order] for name, value in vars(self).items()})


def _turned_spans(keys: Keys, lengths: Ints, noise: Ints, spans: Ints, cut: Ints) -> tuple[Ints, Ints, Ints]:
    """Draw the span masks: kept and masked spans alternate, then the mask is turned (T5's `random_roll`).

    A turn by a uniform offset makes a uniform position of the unturned mask the new first one. `cut` numbers
    those positions not from left to right but by what they are: first kept tokens inside a kept span, then
    the first tokens of kept spans, then the first tokens of masked spans, then tokens inside a masked span. A
    uniform `cut` is a uniform position all the same, and its number alone says whether the turned mask splits
    a span, before any span is drawn.

    Returns:
        example, start and stop of each masked span, unordered within its example.
    """
    count = len(lengths)
    kept = lengths - noise
    urns = np.concatenate([noise, kept])
    streams = np.concatenate([random_streams.derive(keys, _MASKED_SPANS), random_streams.derive(keys, _KEPT_SPANS)])
    pieces = np.concatenate([spans, spans])
    ends = np.empty(int(pieces.sum()), dtype=np.int64)
    closing = np.cumsum(pieces) - 1
    inner = np.ones(len(ends), dtype=bool)
    inner[closing] = False
    ends[inner] = random_streams.choose(streams, urns - 1, pieces - 1) + 1
    ends[closing] = urns
    masked_end, kept_end = np.split(ends, 2)

    example = np.repeat(np.arange(count), spans)
    offset = np.cumsum(spans) - spans
    rank = np.arange(len(example)) - offset[example]
    masked_start = np.where(rank == 0, 0, np.roll(masked_end, 1))
    kept_start = np.where(rank == 0, 0, np.roll(kept_end, 1))

    # The position that becomes the first: which of the four kinds, and which one of its kind.
    kind = np.select([cut < kept - spans, cut < kept, cut < kept + spans], [0, 1, 2], 3)
    number = cut - np.select([kind == 0, kind == 1, kind == 2], [0, kept - spans, kept], kept + spans)
    span_end = np.where((kind == 0)[example], kept_end, masked_end)
    before = span_end - rank - 1 <= number[example]  # spans whose inner tokens all come earlier
    inner_span = np.add.reduceat(before, offset, dtype=np.int64) if count else offset
    span = offset + np.where((kind == 1) | (kind == 2), number, inner_span)
    item = number + inner_span + 1
    position = np.select(
        [kind == 0, kind == 1, kind == 2],
        [
            item + masked_start[span],
            kept_start[span] + masked_start[span],
            kept_end[span] + masked_start[span],
        ],
        kept_end[span] + item,
    )

    start = kept_end + masked_start - position[example]
    start += (start < 0) * lengths[example]
    stop = start + masked_end - masked_start
    over = stop - lengths[example]
    split = np.flatnonzero(over > 0)
    stop[split] = lengths[example[split]]
    return (
        np.concatenate([example, example[split]]),
        np.concatenate([start, np.zeros(len(split), dtype=np.int64)]),
        np.concatenate([stop, over[split]]),
    )


def _ranks(positions: Ints, first: Ints) -> Ints:
    """Number ascending positions within the example they fall in; `first` holds where each example begins."""
    before = np.searchsorted(positions, first)
    return np.arange(len(positions)) - np.repeat(before, np.diff(np.append(before, len(positions))))
