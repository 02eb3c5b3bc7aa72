"""A corpus and tokenizers that need nothing from outside."""

import pydoc_data.topics

import pytest

from fat5.data.train_tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def prose():
    """Documents of English prose that every Python carries."""
    return [text for _, text in sorted(pydoc_data.topics.topics.items())]


@pytest.fixture(scope="session")
def tokenizer(prose):
    """A small Unigram tokenizer with 100 sentinels, mode tokens and byte fallback."""
    return train_tokenizer(prose, "unigram", 2000)


@pytest.fixture(scope="session")
def bare_tokenizer(prose):
    """A small BPE tokenizer without mode tokens."""
    return train_tokenizer(prose[:20], "bpe", 1000, mode_tokens=False)
