"""Read the documents of a corpus, one string each, from files or through `datasets`."""

import glob
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import IO, Any

from fat5.data.options import CorpusOptions

_SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}


class DataError(ValueError):
    """Data that cannot be used; the message names the file or dataset and says what to do."""


def corpus_files(corpus: CorpusOptions) -> list[Path]:
    """Expand the patterns of `corpus.files`; a file that several match comes once, at the first.

    Raises:
        DataError: a pattern matches nothing.
    """
    paths: dict[Path, Path] = {}
    for pattern in corpus.files:
        expanded = Path(pattern).expanduser()
        # A file may have brackets in its name.
        matches = [expanded] if expanded.is_file() else map(Path, sorted(glob.glob(str(expanded), recursive=True)))
        found = {path.resolve(): path for path in matches if path.is_file()}
        if not found:
            raise DataError(
                f"no file matches {pattern}; correct the path. A recipe's are data.train and data.evaluation, on the "
                "command line --set 'data.train=[{files: [my/*.txt]}]'"
            )
        for resolved, path in found.items():
            paths.setdefault(resolved, path)
    return list(paths.values())


def format_of(corpus: CorpusOptions, path: Path) -> str:
    """Give the format of one of a corpus's files: the corpus's own, or by the suffix, `text` for an unknown one."""
    return corpus.format or _SUFFIXES.get(path.suffix.lower(), "text")


def read_documents(corpus: CorpusOptions) -> Iterator[str]:
    """Yield every document of a corpus, in order. Empty ones are yielded too.

    Raises:
        DataError: a file cannot be read or decoded, a line is not JSON, or the text field is missing or not
            text.
    """
    return iter(DocumentStream(corpus))


def place_of(corpus: CorpusOptions, document: str) -> str:
    """Say where in a corpus a document stands, reading until it comes; for messages."""
    if corpus.dataset is None:
        for path in corpus_files(corpus):
            for number, text in enumerate(_from_file(corpus, path), start=1):
                if text == document:
                    return f"{path}, document {number}"
    else:
        for number, text in enumerate(read_documents(corpus)):
            if text == document:
                return f"{corpus.name}, record {number}"
    return corpus.name


class DocumentStream:
    """The documents of a corpus, one after the other, with a state to go on from.

    Args:
        corpus: what to read.
        state: begin where the stream was that gave this `state()`; in the commit of a Hub's data set that it read.

    Raises:
        DataError: as `read_documents`.
    """

    def __init__(self, corpus: CorpusOptions, state: dict[str, Any] | None = None) -> None:
        if state is not None and "revision" in state:
            corpus = replace(corpus, revision=state["revision"])
        self.corpus = corpus
        self._read = 0
        # Only a single source of `datasets` can tell its own place; otherwise documents are read again and
        # skipped.
        self._data = _load(corpus) if corpus.dataset is not None else None
        self._documents = self._all()
        if state is not None and self._data is not None:
            self._data.load_state_dict(state["dataset"])
            self._read = state["read"]
        elif state is not None:
            for _ in islice(self, state["read"]):
                pass

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        document = next(self._documents)
        self._read += 1
        return document

    def state(self) -> dict[str, Any]:
        """Give the place of the next document, as plain data."""
        if self._data is not None:
            return {"read": self._read, "dataset": self._data.state_dict(), "revision": self.corpus.revision}
        return {"read": self._read}

    def _all(self) -> Iterator[str]:
        if self._data is not None:
            yield from _records(self.corpus, self._data, self.corpus.name, lambda: self._read)
            return
        for path in corpus_files(self.corpus):
            yield from _from_file(self.corpus, path)


def _from_file(corpus: CorpusOptions, path: Path) -> Iterator[str]:
    form = format_of(corpus, path)
    if form == "parquet":
        counter = count()
        yield from _records(corpus, _load(corpus, path), str(path), lambda: next(counter))
        return
    errors = "strict" if corpus.invalid_utf8 == "refuse" else "replace"
    try:
        # A byte-order mark at the beginning is none of the text.
        with path.open(encoding="utf-8-sig", errors=errors, newline="") as file:
            if form == "jsonl":
                yield from _from_jsonl(corpus, path, file)
            else:
                yield from _from_text(corpus, file)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not valid UTF-8 (about byte {_first_bad_byte(path)}): repair the file, or set"
            " invalid_utf8: replace for this corpus"
        ) from error


def _from_text(corpus: CorpusOptions, file: IO[str]) -> Iterator[str]:
    if corpus.documents == "file":
        yield file.read()
    elif corpus.documents == "line":
        for line in file:
            yield line.strip("\r\n")
    else:
        lines: list[str] = []
        for line in file:
            if line.strip():
                lines.append(line)
            elif lines:
                yield "".join(lines)
                lines = []
        if lines:
            yield "".join(lines)


def _from_jsonl(corpus: CorpusOptions, path: Path, file: IO[str]) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # too many digits or brackets, too
            raise DataError(f"{path}, line {number}: not JSON that can be read ({error})") from error
        yield _text_of(record, corpus.field, f"{path}, line {number}")


def dataset_builder(corpus: CorpusOptions) -> Any:
    """Find a named data set: its `datasets.DatasetBuilder`, whose `hash` is the commit of a Hub's data set.

    Raises:
        DataError: it cannot be found; or the Hub does not answer, and what is here is of another commit than wanted.
    """
    with _loading(corpus, corpus.name):
        import datasets

        builder = datasets.load_dataset_builder(corpus.dataset, name=corpus.config, revision=corpus.revision)
    # What is in the cache is taken, whichever it is, where the Hub does not answer.
    if re.fullmatch("[0-9a-f]{40}", corpus.revision or "") and builder.hash != corpus.revision:
        raise DataError(
            f"cannot load {corpus.name}: the Hub does not give its commit {corpus.revision}, and what has been"
            f" downloaded is {builder.hash}"
        )
    return builder


def _load(corpus: CorpusOptions, path: Path | None = None) -> Any:
    """Open a `datasets.IterableDataset`: the named one, or a Parquet file."""
    if path is None:
        builder = dataset_builder(corpus)
        with _loading(corpus, f"{corpus.name} (split {corpus.split})"):
            if corpus.streaming:
                return builder.as_streaming_dataset(split=corpus.split)
            builder.download_and_prepare()
            return builder.as_dataset(split=corpus.split).to_iterable_dataset()
    with _loading(corpus, str(path)):
        import datasets

        return datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)


@contextmanager
def _loading(corpus: CorpusOptions, what: str) -> Iterator[None]:
    """Name what cannot be loaded."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"reading {corpus.name} needs the `datasets` package, which is not installed; install it, or give the text"
            " as text or jsonl files"
        ) from error
    try:
        yield
    # A RuntimeError is how `datasets` refuses a data set that is a script.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"cannot load {what}: {error}") from error


def _records(corpus: CorpusOptions, data: Any, where: str, number: Callable[[], int]) -> Iterator[str]:
    import datasets

    # Plain iteration would hand a DataLoader's workers different parts; `iter` gives all of it to each.
    records = iter(data.iter(batch_size=1))
    while True:
        try:
            record = next(records, None)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"{where}, record {number()}: cannot be read, the file may be damaged: {error}") from error
        if record is None:
            return
        first = {key: values[0] for key, values in record.items()}
        yield _text_of(first, corpus.field, f"{where}, record {number()}")


def _text_of(record: object, field: str, where: str) -> str:
    if not isinstance(record, dict) or field not in record:
        keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{where}: no field {field!r} (found: {keys}); set the corpus's field")
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {field!r} is {type(text).__name__}, not text")
    return text


def _first_bad_byte(path: Path) -> int:
    """Find where decoding fails, reading in pieces."""
    done = 0
    rest = b""
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            block = rest + piece
            try:
                block.decode("utf-8")
                rest = b""
            except UnicodeDecodeError as error:
                if error.end < len(block) or error.reason != "unexpected end of data":
                    return done + error.start
                rest = block[error.start :]
            done += len(block) - len(rest)
    return done
