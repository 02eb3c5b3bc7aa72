"""Turn text into token ids that hold text only: no sentinel, mode token or EOS, whatever the text says."""

import pickle
import re
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from fat5.data.documents import DataError, place_of
from fat5.data.options import CorpusOptions
from fat5.data.plain_text import BLANKS, PlainText, Start
from fat5.data.special_ids import SpecialIds

# Longer documents are encoded in pieces, so that memory stays bounded.
_PIECE = 200_000
# How much text one call of the tokenizer gets: enough for all its threads.
_CHARACTERS, _TEXTS = 1 << 20, 1000


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
    by its letters, also where it spells it only once it is normalised (`＜/s＞`).

    Args:
        tokenizer: any `transformers` tokenizer.
        ids: the special ids of the run; their `reserved` ids never come out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ids: SpecialIds) -> None:
        self._tokenizer = tokenizer
        self._plain = PlainText(tokenizer, frozenset(i for i in ids.reserved if i < ids.vocabulary))
        self._reserved = np.zeros(max(ids.vocabulary, ids.rows), dtype=bool)
        self._reserved[[i for i in ids.reserved if i < len(self._reserved)]] = True

    def __call__(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Encode documents: one int32 array each, empty for a document without tokens.

        Raises:
            SpecialTokenError: the tokenizer gives a reserved id even to a text that does not spell one.
        """
        pieces: list[str] = []
        starts: list[Start] = []
        counts = []
        for text in texts:
            # Broken surrogates, which JSON can spell, have no UTF-8 form.
            clean = text.encode("utf-8", "replace").decode("utf-8")
            cut = [clean]
            if len(clean) > _PIECE:
                cut = split_text(clean, "".join(self._plain.blanks), self._plain.cuts_words, _PIECE)
            pieces += cut
            starts += ["beginning", *(self._plain.blanks.get(piece[0], "within") for piece in cut[1:])]
            counts.append(len(cut))
        encoded: list[NDArray[np.int32]] = []
        for group in chunks(pieces):
            encoded += self._encode(group, starts[len(encoded) : len(encoded) + len(group)])
        documents, at = [], 0
        for text, count in zip(texts, counts, strict=True):
            ids = encoded[at] if count == 1 else np.concatenate(encoded[at : at + count])
            if (special := self._reserved[ids]).any():
                token = self._tokenizer.convert_ids_to_tokens(int(ids[special][0]))
                raise SpecialTokenError(str(token), text)
            documents.append(ids)
            at += count
        return documents

    def _encode(self, texts: Sequence[str], starts: Sequence[Start]) -> list[NDArray[np.int32]]:
        found: dict[int, NDArray[np.int32]] = {}
        for start in set(starts):
            chosen = [n for n, its_start in enumerate(starts) if its_start == start]
            found |= zip(chosen, self._plain.encode([texts[n] for n in chosen], start), strict=True)
        return [found[n] for n in range(len(texts))]


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

    Raises:
        SpecialTokenError: as `Encoder`.
        DataError: one of the other processes was killed.
    """
    if processes == 1:
        for group in groups:
            yield len(group), encoder(group)
        return
    waiting: deque[tuple[int, Future[list[NDArray[np.int32]]]]] = deque()
    with TemporaryDirectory() as folder:
        # Through a file: a worker that dies before it has read a large argument would leave this process waiting.
        file = Path(folder, "encoder")
        file.write_bytes(pickle.dumps(encoder))
        try:
            with ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, (file,)) as pool:
                for group in groups:
                    waiting.append((len(group), pool.submit(_encode_in_worker, group)))
                    if len(waiting) > 2 * processes:
                        size, future = waiting.popleft()
                        yield size, future.result()
                for size, future in waiting:
                    yield size, future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a process that encodes text was ended from outside, perhaps for want of memory; what is complete is"
                " kept: tokenise again, in fewer processes (--num-proc)"
            ) from error


_worker_encoder: Encoder | None = None


def _start_worker(file: Path) -> None:
    global _worker_encoder
    _worker_encoder = pickle.loads(file.read_bytes())


def _encode_in_worker(texts: list[str]) -> list[NDArray[np.int32]]:
    assert _worker_encoder is not None
    return _worker_encoder(texts)


def split_text(text: str, blanks: str, within: bool, most: int) -> list[str]:
    """Cut a text into pieces of about `most` characters, each starting with the blanks it was cut at.

    Where so many characters come without a blank, the cut is within a word: what is around it may be told apart into
    other tokens than in the whole text, of the same letters. Such a word's last piece ends with it.

    Args:
        text: a document.
        blanks: the characters at which it may be cut.
        within: whether it may be cut within a word; otherwise such a piece is longer.
        most: characters of a piece.
    """
    # A run of blanks stays together, at the start of the next piece.
    blank = re.compile(f"(?<=[^{BLANKS}])[{blanks}]") if blanks else re.compile("(?!)")
    pieces = []
    at = 0
    in_word = False  # the piece begins within a word
    while in_word or len(text) - at > most:
        found = blank.finditer(text, at + 1, at + most)
        cut = next(found, None) if in_word else next(iter(deque(found, maxlen=1)), None)
        in_word = cut is None and within
        if cut is None and len(text) - at <= most:
            break
        end = cut.start() if cut else _place_within(text, at + 1, at + most) if within else None
        if end is None:
            later = blank.search(text, at + most)
            if later is None:
                break
            end, in_word = later.start(), False
        pieces.append(text[at:end])
        at = end
    pieces.append(text[at:])
    return pieces


def _place_within(text: str, first: int, last: int) -> int | None:
    """Find the last place at which a word can be cut: between two characters that normalisation leaves apart."""
    return next((place for place in range(last, first, -1) if _apart(text[place - 1], text[place])), None)


def _apart(before: str, behind: str) -> bool:
    if any(unicodedata.category(c)[0] not in "LNPS" or c in BLANKS for c in (before, behind)):
        return False
    normal = unicodedata.normalize("NFKC", before), unicodedata.normalize("NFKC", behind)
    return unicodedata.normalize("NFKC", before + behind) == "".join(normal) and " " not in "".join(normal)
