"""Tokenised corpora on disk: memory-mapped shards with an index, written once and reused.

A store is a folder `<key>/` with `shard-00000.tokens` (raw little-endian ids), `shard-00000.ends` (where each
document ends, int64) and so on, and `index.json`, written last. A tokenisation that was stopped goes on
behind its last complete shard.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from fat5.data.documents import DataError, corpus_files, format_of, read_documents
from fat5.data.encode import Encoder, chunks, encode_chunks, naming_documents
from fat5.data.hub_revision import pinned
from fat5.data.options import CorpusOptions
from fat5.data.special_ids import SpecialIds
from fat5.folders import write_file

Progress = Callable[[int, int], None]

_FORMAT = 2
_SHARD_TOKENS = 1 << 27


class TokenStore:
    """A tokenised corpus, read through memory maps.

    Args:
        folder: a complete store.

    Raises:
        DataError: the index is missing, of another format, or a shard is missing or not as long as the index
            says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.index: dict[str, Any] = dict(json.loads((folder / "index.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{folder} holds no complete tokenised corpus: {error}") from error
        if self.index.get("format") != _FORMAT:
            raise DataError(f"{folder} has format {self.index.get('format')}, not {_FORMAT}; tokenise the corpus again")
        self.dtype = np.dtype(self.index["dtype"])
        self._shards = []
        for n, shard in enumerate(self.index["shards"]):
            ends = _map(folder / f"shard-{n:05d}.ends", np.dtype("<i8"), shard["documents"])
            self._shards.append((_map(folder / f"shard-{n:05d}.tokens", self.dtype, shard["tokens"]), ends))

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[Path]]:
        """Give a worker the folder, not the mapped files' contents."""
        return TokenStore, (self.folder,)

    @property
    def documents(self) -> int:
        """Number of documents, all of at least one token."""
        return sum(len(ends) for _, ends in self._shards)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(len(tokens) for tokens, _ in self._shards)

    @property
    def identity(self) -> str:
        """A hash of its tokens and documents, the same wherever and from whatever files they were made."""
        return hashlib.sha256(json.dumps(self.index["shards"], sort_keys=True).encode()).hexdigest()[:24]

    def shards(self) -> list[tuple[NDArray[Any], NDArray[np.int64]]]:
        """Give each shard's tokens [T] and document ends [D]."""
        return self._shards


def _map(path: Path, dtype: np.dtype[Any], length: int) -> NDArray[Any]:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} is missing; delete its folder and tokenise the corpus again") from error
    if size != length * dtype.itemsize:
        raise DataError(
            f"{path} has {size} bytes, and its index says {length * dtype.itemsize}: it was cut short or changed;"
            " delete its folder and tokenise the corpus again"
        )
    if not length:
        return np.empty(0, dtype=dtype)
    # A plain array over the map: slices of the memmap class cost more than reading them.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(length,)))


@dataclass(frozen=True)
class _Shard:
    documents: int  # that have tokens
    tokens: int
    read: int  # documents read from the source, empty ones included
    sha256: str  # of the tokens


def default_cache() -> Path:
    """Give the folder for tokenised corpora when the recipe names none."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fat5" / "tokens"


def store_key(corpus: CorpusOptions, tokenizer: PreTrainedTokenizerBase, ids: SpecialIds) -> str:
    """Hash everything that decides the tokens of a corpus.

    Local files, those of a dataset's folder too, count by path, size and time of change; a dataset of the Hub by name,
    configuration, split and revision, which `tokenize_corpus` has made a commit.
    """
    options = asdict(corpus)
    del options["weight"], options["streaming"]
    local = []
    for path in _local_files(corpus):
        stat = path.stat()
        local.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns, format_of(corpus, path)])
    if local:
        del options["files"], options["format"]
        options["dataset"] = corpus.dataset is not None
    reserved = sorted(i for i in ids.reserved if i < ids.vocabulary)
    content = [_FORMAT, options, local, tokenizer_hash(tokenizer), reserved]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def _local_files(corpus: CorpusOptions) -> list[Path]:
    """List what a corpus is read from on this machine; nothing for a dataset of the Hub."""
    if corpus.dataset is None:
        return corpus_files(corpus)
    # Hidden files are none of a dataset's, for `datasets` as for `glob`.
    found = (Path(corpus.dataset, name) for name in sorted(glob("**", root_dir=corpus.dataset, recursive=True)))
    return [path for path in found if path.is_file()]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what a tokenizer does: its class, and its fast backend's definition or its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{type(tokenizer).__name__}\n{body}".encode()).hexdigest()


def tokenize_corpus(
    corpus: CorpusOptions,
    tokenizer: PreTrainedTokenizerBase,
    ids: SpecialIds,
    cache: Path | None = None,
    *,
    processes: int = 1,
    progress: Progress | None = None,
) -> TokenStore:
    """Open the tokenised form of a corpus, making it first where it is not there.

    Args:
        corpus: what to read.
        tokenizer: makes ids of text.
        ids: the special ids of the run.
        cache: folder of all stores; None for `default_cache()`.
        processes: how many processes encode.
        progress: called with the documents and tokens of each group that has been written.

    Raises:
        DataError: the corpus cannot be read or holds no text, or the cache cannot be written.

    Warns:
        UserWarning: the Hub does not answer, and what was tokenised before is taken; see `fat5.data.hub_revision`.
    """
    cache = cache or default_cache()
    try:
        corpus = pinned(corpus, cache)
    except OSError as error:
        raise DataError(f"cannot write to {cache}: {error}") from error
    folder = cache / store_key(corpus, tokenizer, ids)
    if not (folder / "index.json").exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _only_writer(folder), naming_documents(corpus):
                documents = read_documents(corpus)
                encoder = Encoder(tokenizer, ids)
                write_store(folder, documents, encoder, ids.vocabulary, processes=processes, progress=progress)
        except OSError as error:
            raise DataError(f"cannot write the tokenised corpus to {folder}: {error}") from error
    store = TokenStore(folder)
    if not store.tokens:
        raise DataError(f"the corpus {corpus.name} holds no text")
    return store


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Let one process at a time write a store; another waits, and finds it done."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_store(
    folder: Path,
    documents: Iterable[str],
    encoder: Encoder,
    vocabulary: int,
    *,
    shard_tokens: int = _SHARD_TOKENS,
    processes: int = 1,
    progress: Progress | None = None,
) -> None:
    """Encode documents into the shards of a store, behind those that are complete; the index is written last."""
    if (folder / "index.json").exists():
        return
    dtype = np.dtype("<u2") if vocabulary <= 1 << 16 else np.dtype("<u4")
    shards = _finished_shards(folder)
    texts = islice(documents, sum(s.read for s in shards), None)
    groups = encode_chunks(chunks(texts), encoder, processes)
    while (shard := _write_shard(folder, len(shards), groups, dtype, shard_tokens, progress)) is not None:
        shards.append(shard)
    index = {"format": _FORMAT, "dtype": dtype.str, "shards": [asdict(s) for s in shards]}
    write_file(folder / "index.json", json.dumps(index, indent=1).encode())


def _write_shard(
    folder: Path,
    number: int,
    groups: Iterator[tuple[int, list[NDArray[np.int32]]]],
    dtype: np.dtype[Any],
    most: int,
    progress: Progress | None,
) -> _Shard | None:
    name = folder / f"shard-{number:05d}"
    partial = name.with_suffix(".tokens.partial")
    ends: list[int] = []
    tokens = read = 0
    digest = hashlib.sha256()
    with partial.open("wb") as file:
        for size, encoded in groups:
            before = tokens
            for ids in encoded:
                if len(ids):
                    tokens += len(ids)
                    ends.append(tokens)
            if tokens > before:
                content = np.concatenate(encoded).astype(dtype).tobytes()
                file.write(content)
                digest.update(content)
            read += size
            if progress is not None:
                progress(size, tokens - before)
            if tokens >= most:
                break
        file.flush()
        os.fsync(file.fileno())
    if not read:
        partial.unlink()
        return None
    shard = _Shard(len(ends), tokens, read, digest.hexdigest())
    write_file(name.with_suffix(".ends"), np.array(ends, dtype="<i8").tobytes())
    partial.rename(name.with_suffix(".tokens"))
    write_file(name.with_suffix(".json"), json.dumps(asdict(shard)).encode())
    return shard


def _finished_shards(folder: Path) -> list[_Shard]:
    shards: list[_Shard] = []
    while (path := folder / f"shard-{len(shards):05d}.json").exists():
        shards.append(_Shard(**json.loads(path.read_text(encoding="utf-8"))))
    return shards
