"""The ids that mark things in a training example: sentinels, mode tokens, EOS and padding."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from fat5.data.denoisers import Denoiser

#: First sentinel id and number of sentinels of each family; they count down from the first. ByT5's are byte
#: values (it was trained so: arXiv:2105.13626, section 3.1 reuses the last 100 byte ids); its tokenizer's own
#: `<extra_id_0>`, 259, was never trained.
FAMILY_SENTINELS: dict[str, tuple[int, int]] = {
    "t5": (32099, 100),
    "mt5": (250099, 100),
    "umt5": (256299, 300),
    "byt5": (258, 100),
}

# UL2's mode tokens always get the same free rows, so that a run can go on with another mixture of them.
_STANDARD_MODES = ("[R]", "[S]", "[X]")


@dataclass(frozen=True)
class SpecialIds:
    """Where the special ids of a run are.

    Attributes:
        sentinels: [N] int64, the id of `<extra_id_0>`, `<extra_id_1>`, ...; not necessarily contiguous; may
            be empty.
        modes: mode token -> id.
        eos: appended to every input and target.
        pad: fills the rest of a padded row.
        vocabulary: number of ids the tokenizer can give; text ids are below it.
        rows: embedding rows the run needs; the model is resized when it has fewer.
        reserved: ids that must not occur in text (sentinels, mode tokens, the tokenizer's special tokens but
            unk).
        sentinels_in_text: the sentinels are also ordinary text ids (ByT5).
    """

    sentinels: NDArray[np.int64]
    modes: dict[str, int]
    eos: int
    pad: int
    vocabulary: int
    rows: int
    reserved: frozenset[int] = field(default_factory=frozenset)
    sentinels_in_text: bool = False


def special_ids(
    tokenizer: PreTrainedTokenizerBase,
    denoisers: Iterable[Denoiser],
    embedding_rows: int | None = None,
    family: str = "auto",
) -> SpecialIds:
    """Find sentinels and mode tokens for a tokenizer and a mixture.

    A mode token that the tokenizer knows as one token keeps its id; the others take the free rows between the
    tokenizer's last id and `embedding_rows` (T5: 32100 ids, 32128 rows), and then new rows behind those,
    which the trainer must add (`SpecialIds.rows`).

    Args:
        tokenizer: any `transformers` tokenizer with an EOS token.
        denoisers: the mixture.
        embedding_rows: rows of the model's embedding; None for exactly as many as the tokenizer has ids.
        family: a key of `FAMILY_SENTINELS`, or `auto`.

    Raises:
        ValueError: the tokenizer has no EOS token, or no sentinels although the mixture needs them, or fewer
            ids than the family named; or a mode token means something else already.
    """
    denoisers = tuple(denoisers)
    name = type(tokenizer).__name__
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer ({name}) has no EOS token; T5 ends every input and target with one")
    vocabulary = _size(tokenizer)
    sentinels, in_text = find_sentinels(tokenizer, family)
    if not len(sentinels) and any(d.kind == "span" or d.sentinel for d in denoisers):
        raise ValueError(
            f"the tokenizer ({name}, {vocabulary} ids) has no sentinels: no tokens <extra_id_0>, <extra_id_1>, ...,"
            " and no known family. Add them with `fat5 train-tokenizer --extend`, name the family (data.sentinels), or"
            " use a mixture without sentinels (prefix_lm)"
        )
    wanted = {d.mode for d in denoisers if d.mode is not None}
    modes, rows = _mode_ids(tokenizer, wanted, vocabulary, embedding_rows)
    taken = {*sentinels.tolist(), tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    for mode in (m for m, i in modes.items() if i in taken):
        raise ValueError(f"the mode {mode} is a sentinel, EOS, padding or unknown token of the tokenizer; take another")
    # Text must not spell a standard mode token either, in use or not: so a corpus need not be tokenised again.
    known = tokenizer.get_vocab()
    reserved = {i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id}
    reserved |= {known[m] for m in _STANDARD_MODES if m in known} | set(modes.values())
    if not in_text:
        reserved |= set(sentinels.tolist())
    return SpecialIds(
        sentinels=sentinels,
        modes=modes,
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        vocabulary=vocabulary,
        rows=rows,
        reserved=frozenset(reserved),
        sentinels_in_text=in_text,
    )


def find_sentinels(tokenizer: PreTrainedTokenizerBase, family: str = "auto") -> tuple[NDArray[np.int64], bool]:
    """Find the sentinel ids, by family first, then by the names `<extra_id_N>`.

    Returns:
        [N] int64 ids of sentinel 0, 1, ... (empty if there are none), and whether they are also text ids.

    Raises:
        ValueError: `family` is unknown, or its sentinels lie outside the tokenizer's vocabulary.
    """
    size = _size(tokenizer)
    if family == "auto":
        family = _recognise(tokenizer, size)
    if family == "by_name":
        return _named_sentinels(tokenizer), False
    if family not in FAMILY_SENTINELS:
        raise ValueError(f"unknown sentinel family {family!r}; known: {', '.join(FAMILY_SENTINELS)}")
    first, count = FAMILY_SENTINELS[family]
    if first >= size:
        raise ValueError(
            f"the tokenizer has {size} ids, too few for the sentinels of {family} ({first} counting down); is it"
            " another family's?"
        )
    return np.arange(first, first - count, -1, dtype=np.int64), family == "byt5"


def _recognise(tokenizer: PreTrainedTokenizerBase, size: int) -> str:
    if "ByT5" in type(tokenizer).__name__:
        return "byt5"
    for family, (first, _) in FAMILY_SENTINELS.items():
        if family != "byt5" and size == first + 1 and _sentinel_number(_token(tokenizer, first)) == 0:
            return family
    return "by_name"


def _named_sentinels(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """Collect `<extra_id_0>` up to the first number that is missing."""
    numbered = {n: i for token, i in tokenizer.get_vocab().items() if (n := _sentinel_number(token)) is not None}
    count = next(n for n in range(len(numbered) + 1) if n not in numbered)
    return np.array([numbered[n] for n in range(count)], dtype=np.int64)


def _sentinel_number(token: str) -> int | None:
    name = token.removeprefix("▁")  # as SentencePiece stores them in mT5's vocabulary
    number = name.removeprefix("<extra_id_").removesuffix(">")
    return int(number) if name == f"<extra_id_{number}>" and number.isdecimal() else None


def _token(tokenizer: PreTrainedTokenizerBase, i: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(i))


def _size(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def _mode_ids(
    tokenizer: PreTrainedTokenizerBase, wanted: set[str], vocabulary: int, embedding_rows: int | None
) -> tuple[dict[str, int], int]:
    known = tokenizer.get_vocab()
    rows = max(vocabulary, embedding_rows or 0)
    # All of the standard ones have a place whenever one is used, in use or not.
    listed = [m for m in _STANDARD_MODES if wanted & set(_STANDARD_MODES)]
    listed += sorted(wanted - set(_STANDARD_MODES))
    places = {m: vocabulary + n for n, m in enumerate(m for m in listed if m not in known)}
    modes = {m: known[m] if m in known else places[m] for m in sorted(wanted)}
    needed = max(places.values(), default=-1) + 1 if any(m in places for m in wanted) else 0
    return modes, max(rows, needed)
