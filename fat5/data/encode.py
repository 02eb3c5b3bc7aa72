"""Turn text into token ids that hold text only: no sentinel, mode token or EOS, whatever the text says."""

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from fat5.data.special_ids import SpecialIds

# Longer documents are encoded in pieces, cut before a space, so that memory stays bounded.
_PIECE = 200_000
# How much text one call of the tokenizer gets: enough for all its threads.
_CHARACTERS, _TEXTS = 1 << 20, 1000


class Encoder:
    """Encodes documents with a tokenizer, without special tokens.

    A text that spells a special token (`<extra_id_0>`, `</s>`, ...) is encoded as ordinary characters.

    Args:
        tokenizer: any `transformers` tokenizer.
        ids: the special ids of the run; their `reserved` ids never come out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ids: SpecialIds) -> None:
        self._tokenizer = tokenizer
        size = max(ids.vocabulary, ids.rows)
        self._reserved = np.zeros(size, dtype=bool)
        self._reserved[[i for i in ids.reserved if i < size]] = True
        spelt = {str(tokenizer.convert_ids_to_tokens(i)) for i in ids.reserved if i < len(tokenizer)}
        spelt |= {s.removeprefix("▁") for s in spelt}
        names = sorted((re.escape(s) for s in spelt if s), key=len, reverse=True)
        self._names = re.compile("|".join(names)) if names else None

    def __call__(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Encode documents: one int32 array each, empty for a document without tokens.

        Raises:
            ValueError: the tokenizer gives a reserved id even to a text that does not spell one.
        """
        pieces: list[str] = []
        counts = []
        for text in texts:
            cut = split_text(text)
            pieces += cut
            counts.append(len(cut))
        encoded = [ids for group in chunks(pieces) for ids in self._encode(group)]
        for n in self._wrong(encoded):
            encoded[n] = self._encode_apart(pieces[n])
        documents, at = [], 0
        for count in counts:
            documents.append(encoded[at] if count == 1 else np.concatenate(encoded[at : at + count]))
            at += count
        return documents

    def _encode(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        if not texts:
            return []
        # Broken surrogates, which JSON can spell, have no UTF-8 form.
        clean = [t.encode("utf-8", "replace").decode("utf-8") for t in texts]
        output = self._tokenizer(clean, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [np.array(i, dtype=np.int32) for i in output["input_ids"]]

    def _wrong(self, encoded: Sequence[NDArray[np.int32]]) -> list[int]:
        lengths = np.array([len(e) for e in encoded])
        if not lengths.sum():
            return []
        bad = self._reserved[np.concatenate(encoded)]
        return np.unique(np.repeat(np.arange(len(encoded)), lengths)[bad]).tolist() if bad.any() else []

    def _encode_apart(self, text: str) -> NDArray[np.int32]:
        """Encode a text in parts, cutting every special token's name after its first character."""
        cuts = [m.start() + 1 for m in self._names.finditer(text)] if self._names else []
        edges = [0, *cuts, len(text)]
        parts = self._encode([text[a:b] for a, b in pairwise(edges)])
        if bad := self._wrong(parts):
            tokens = parts[bad[0]]
            token = self._tokenizer.convert_ids_to_tokens(int(tokens[self._reserved[tokens]][0]))
            raise ValueError(f"the tokenizer encodes ordinary text as the special token {token!r}")
        return np.concatenate(parts)


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
    """Cut a text into pieces of at most `most` characters, each starting with the space it was cut at.

    A stretch of `most` characters without a space is cut where it is full.
    """
    pieces = []
    at = 0
    while len(text) - at > most:
        space = text.rfind(" ", at + 1, at + most)
        # A run of spaces stays together, at the start of the next piece.
        while space > at + 1 and text[space - 1] == " ":
            space -= 1
        end = space if space > at + 1 else at + most
        pieces.append(text[at:end])
        at = end
    pieces.append(text[at:])
    return pieces
