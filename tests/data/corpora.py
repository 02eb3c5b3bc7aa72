"""Stores of random documents, made without a tokenizer."""

import dataclasses
import json

import numpy as np
from denoising import T5_IDS

from fat5.data.token_store import TokenStore


def random_documents(seed, lengths):
    """Documents of ordinary T5 ids, of these lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 32000, n).astype(np.uint16) for n in lengths]


def make_store(folder, documents, shards=1):
    """Write a store of documents of ids, in so many shards."""
    folder.mkdir(parents=True)
    entries = []
    for n, part in enumerate(np.array_split(np.arange(len(documents)), shards)):
        tokens = np.concatenate([documents[i] for i in part]).astype("<u2")
        ends = np.cumsum([len(documents[i]) for i in part]).astype("<i8")
        (folder / f"shard-{n:05d}.tokens").write_bytes(tokens.tobytes())
        (folder / f"shard-{n:05d}.ends").write_bytes(ends.tobytes())
        entries.append({"documents": len(ends), "tokens": len(tokens), "read": len(ends)})
    (folder / "index.json").write_text(json.dumps({"format": 2, "dtype": "<u2", "shards": entries}))
    return TokenStore(folder)


def t5_ids(**changes):
    """T5's special ids, with changes."""
    return dataclasses.replace(T5_IDS, **changes)
