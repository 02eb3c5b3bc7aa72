"""Which commit of a Hub's data set is read: what was tokenised, or read so far, must not change under its name."""

import hashlib
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

from fat5.data.documents import DataError, dataset_builder
from fat5.data.options import CorpusOptions

_COMMIT = re.compile("[0-9a-f]{40}")


def pinned(corpus: CorpusOptions, cache: Path | None = None) -> CorpusOptions:
    """Set the revision of a data set of the Hub to the commit that it stands for now; other corpora stay as they are.

    Where the Hub does not answer, `datasets` takes the commit that it has downloaded last, and says so. Where it has
    none, the commit of the last tokenisation in `cache` is taken, with a warning.

    Args:
        corpus: what to read.
        cache: folder of the tokenised corpora, where the commit is remembered.

    Raises:
        DataError: the data set cannot be found, or the Hub does not answer and nothing of it is here.
    """
    if corpus.dataset is None or Path(corpus.dataset).exists() or _COMMIT.fullmatch(corpus.revision or ""):
        return corpus
    remembered = None if cache is None else cache / f"{_hash(corpus)}.revision"
    try:
        commit = str(dataset_builder(corpus).hash)
    except DataError as error:
        if remembered is None or not remembered.exists():
            raise
        commit = remembered.read_text(encoding="utf-8")
        warnings.warn(
            f"{corpus.name}: using what was tokenised of its commit {commit} before, for want of an answer ({error})",
            stacklevel=2,
        )
        return replace(corpus, revision=commit)
    if not _COMMIT.fullmatch(commit):  # not from a repository
        return corpus
    if remembered is not None:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        remembered.write_text(commit, encoding="utf-8")
    return replace(corpus, revision=commit)


def _hash(corpus: CorpusOptions) -> str:
    named = json.dumps([corpus.dataset, corpus.config, corpus.revision])
    return hashlib.sha256(named.encode()).hexdigest()[:24]
