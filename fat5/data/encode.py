"""Turn text into token ids that hold text only: no sentinel, mode token or EOS, whatever the text says."""

import re
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray
from tokenizers import NormalizedString, Regex
from tokenizers.normalizers import Normalizer
from transformers import PreTrainedTokenizerBase

from fat5.data.documents import DataError, place_of
from fat5.data.options import CorpusOptions
from fat5.data.special_ids import SpecialIds

# Longer documents are encoded in pieces, so that memory stays bounded.
_PIECE = 200_000
# How much text one call of the tokenizer gets: enough for all its threads.
_CHARACTERS, _TEXTS = 1 << 20, 1000
_BLANKS = " \n\r\t"
_FIRST_BLANK = re.compile(r"(?<=[^ \n\r\t])[ \n\r\t]")
# What an id may be beside ordinary.
_DOUBTFUL, _RESERVED = 1, 2
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class SpecialTokenError(DataError):
    """The tokenizer gives a special token for a document that does not spell it.

    Args:
        token: the special token.
        document: the text.
    """

    def __init__(self, token: str, document: str) -> None:
        super().__init__(token, document)
        self.token, self.document = token, document

    def __str__(self) -> str:
        return (
            f"the tokenizer encodes ordinary text as the special token {self.token!r}; take the text out, or use"
            f" another tokenizer (the document begins {self.document[:40]!r})"
        )


@contextmanager
def naming_documents(corpus: CorpusOptions) -> Iterator[None]:
    """Add to a refused document where in its corpus it stands."""
    try:
        yield
    except SpecialTokenError as error:
        raise DataError(f"{place_of(corpus, error.document)}: {error}") from error


class Encoder:
    """Encodes documents with a tokenizer, without special tokens.

    A text that spells a special token (`<extra_id_0>`, `</s>`, ...), a byte (`<0x41>`) or the unknown token is encoded
    as ordinary characters, also where it does so only once it is normalised (`＜/s＞`).

    Args:
        tokenizer: any `transformers` tokenizer.
        ids: the special ids of the run; their `reserved` ids never come out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ids: SpecialIds) -> None:
        self._tokenizer = tokenizer
        size = max(ids.vocabulary, ids.rows)
        # Ids that text may have, but by its letters only, and not by their names: bytes and the unknown token.
        doubtful = {token: i for token, i in tokenizer.get_vocab().items() if _BYTE.fullmatch(token)}
        if tokenizer.unk_token is not None and tokenizer.unk_token_id not in ids.reserved:
            doubtful[str(tokenizer.unk_token)] = tokenizer.unk_token_id
        self._kinds = np.zeros(size, dtype=np.uint8)
        self._kinds[list(doubtful.values())] = _DOUBTFUL
        self._kinds[[i for i in ids.reserved if i < size]] = _RESERVED
        spelt = {str(tokenizer.convert_ids_to_tokens(i)).removeprefix("▁") for i in ids.reserved if i < len(tokenizer)}
        self._names = _any_of(spelt | set(doubtful))
        self._doubtful = _any_of(set(doubtful))
        self._unusual = _unusual_spelling(frozenset(doubtful))

    def __call__(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Encode documents: one int32 array each, empty for a document without tokens.

        Raises:
            SpecialTokenError: the tokenizer gives a reserved id even to a text that does not spell one.
        """
        pieces: list[str] = []
        counts = []
        for text in texts:
            # Broken surrogates, which JSON can spell, have no UTF-8 form.
            cut = split_text(text.encode("utf-8", "replace").decode("utf-8"))
            pieces += cut
            counts.append(len(cut))
        encoded = [ids for group in chunks(pieces) for ids in self._encode(group)]
        owner = np.repeat(np.arange(len(texts)), counts)
        for n, kind in self._marked(encoded):
            if kind == _RESERVED or self._spells_doubtful(pieces[n]):
                encoded[n] = self._encode_apart(pieces[n], texts[owner[n]])
        documents, at = [], 0
        for count in counts:
            documents.append(encoded[at] if count == 1 else np.concatenate(encoded[at : at + count]))
            at += count
        return documents

    def _encode(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        if not texts:
            return []
        output = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [np.array(i, dtype=np.int32) for i in output["input_ids"]]

    def _marked(self, encoded: Sequence[NDArray[np.int32]]) -> list[tuple[int, int]]:
        """Find the texts with ids that are not ordinary, and the gravest kind of each."""
        lengths = np.array([len(e) for e in encoded])
        if not lengths.sum():
            return []
        kinds = self._kinds[np.concatenate(encoded)]
        if not kinds.any():
            return []
        filled = np.flatnonzero(lengths)
        gravest = np.maximum.reduceat(kinds, (np.cumsum(lengths) - lengths)[filled])
        return [(n, kind) for n, kind in zip(filled.tolist(), gravest.tolist(), strict=True) if kind]

    def _spells_doubtful(self, text: str) -> bool:
        if self._doubtful is None or self._unusual is None:
            return False
        if self._doubtful.search(text):
            return True
        normalizer = self._normalizer()
        if normalizer is None or not self._unusual.search(text):
            return False
        return self._doubtful.search(normalizer.normalize_str(text)) is not None

    def _normalizer(self) -> Normalizer | None:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return None if backend is None else backend.normalizer

    def _encode_apart(self, text: str, document: str) -> NDArray[np.int32]:
        """Encode a text in parts, cutting every special token's name after its first character."""
        edges = [0, *self._places_to_cut(text), len(text)]
        texts = [text[a:b] for a, b in pairwise(edges)]
        parts = self._encode(texts)
        for n, kind in self._marked(parts):
            if kind == _RESERVED and len(texts) == 1:
                token = next(i for i in parts[n].tolist() if self._kinds[i] == _RESERVED)
                raise SpecialTokenError(str(self._tokenizer.convert_ids_to_tokens(token)), document)
            if kind == _RESERVED:  # the cut left another name
                parts[n] = self._encode_apart(texts[n], document)
        return np.concatenate(parts)

    def _places_to_cut(self, text: str) -> list[int]:
        """Find the second character of every name, as the text has it and as its normal form does."""
        if self._names is None:
            return []
        places = {m.start() + 1 for m in self._names.finditer(text)}
        if (normalizer := self._normalizer()) is not None:
            normal = NormalizedString(text)
            normalizer.normalize(normal)
            at = 0
            for part in normal.split(Regex(self._names.pattern), "isolated"):
                if self._names.fullmatch(part.normalized) and (found := text.find(part.original, at)) >= 0:
                    places.add(found + 1)
                    at = found + len(part.original)
        return sorted(place for place in places if place < len(text))


def _any_of(names: set[str]) -> re.Pattern[str] | None:
    """Match any of the names; all bytes as one pattern, which is much faster."""
    others = {name for name in names if name and not _BYTE.fullmatch(name)}
    patterns = sorted(map(re.escape, others), key=len, reverse=True)
    if any(map(_BYTE.fullmatch, names)):
        patterns.append(_BYTE.pattern)
    return re.compile("|".join(patterns)) if patterns else None


@cache
def _unusual_spelling(names: frozenset[str]) -> re.Pattern[str] | None:
    """Match what a text must hold to spell one of the names only once it is normalised.

    That is a variant of a first character, or a plain one with some other character than plain ASCII behind it or
    behind more of the name.
    """
    if not names:
        return None
    first = {name[0] for name in names}
    variants = {c for c in map(chr, range(0x80, 0x10000)) if unicodedata.normalize("NFKC", c) in first}
    start, inside, variant = ("".join(map(re.escape, sorted(s))) for s in (first, set("".join(names)), variants))
    longest = max(map(len, names))
    return re.compile(rf"[{start}](?=[{inside}]{{0,{longest}}}[^\n\r\t -~])" + (f"|[{variant}]" if variant else ""))


def chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group texts so that one call of the tokenizer has enough to do and bounded memory."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= _CHARACTERS or len(chunk) >= _TEXTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def encode_chunks(
    groups: Iterable[list[str]], encoder: Encoder, processes: int = 1
) -> Iterator[tuple[int, list[NDArray[np.int32]]]]:
    """Encode groups of documents, in order, in this process or several others.

    Yields:
        How many documents the group has, and the ids of each.
    """
    if processes == 1:
        for group in groups:
            yield len(group), encoder(group)
        return
    waiting: deque[tuple[int, Future[list[NDArray[np.int32]]]]] = deque()
    with ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, (encoder,)) as pool:
        for group in groups:
            waiting.append((len(group), pool.submit(_encode_in_worker, group)))
            if len(waiting) > 2 * processes:
                size, future = waiting.popleft()
                yield size, future.result()
        for size, future in waiting:
            yield size, future.result()


_worker_encoder: Encoder | None = None


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder


def _encode_in_worker(texts: list[str]) -> list[NDArray[np.int32]]:
    assert _worker_encoder is not None
    return _worker_encoder(texts)


def split_text(text: str, most: int = _PIECE) -> list[str]:
    """Cut a text into pieces of about `most` characters, each starting with the blanks it was cut at.

    A piece is longer where so many characters come without a blank: a cut within a word would change its tokens.
    """
    pieces = []
    at = 0
    while len(text) - at > most:
        end = max(text.rfind(blank, at + 1, at + most) for blank in _BLANKS)
        # A run of blanks stays together, at the start of the next piece.
        while end > at and text[end - 1] in _BLANKS:
            end -= 1
        if end <= at:
            later = _FIRST_BLANK.search(text, at + most)
            if later is None:
                break
            end = later.start()
        pieces.append(text[at:end])
        at = end
    pieces.append(text[at:])
    return pieces
