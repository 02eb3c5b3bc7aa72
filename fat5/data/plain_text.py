"""A tokenizer that takes every text as plain text: nothing that a text spells stands for a special token or a byte."""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerBase

#: What a text is of its document: its beginning, what follows from a blank on, or from within a word on.
Start = Literal["beginning", "blank", "within"]

#: What is or, to some normalizers, becomes white space.
BLANKS = (
    "".join(c for c in map(chr, range(0x10000)) if c.isspace()) + "\u200b\u200c\u200d\u200e\u200f\u2581\ufeff\ufffd"
)
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class PlainText:
    """Encodes plain text with a tokenizer.

    A special token is an entry of the vocabulary with a name, and a text that has the name would be encoded as the
    token. The fast backend is therefore copied, with other names, which no text has, for all that text must not spell;
    ids and everything else stay. Tokenizers without a fast backend are asked to split such names
    (`split_special_tokens`).

    Args:
        tokenizer: any `transformers` tokenizer.
        reserved: the special ids, which text must not spell.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reserved: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backends: dict[Start, Tokenizer] = {}  # none where there is no fast one
        self._unknown = -1
        self._bytes: list[int] | None = None
        if backend is not None:
            definition = json.loads(backend.to_str())
            self._take_bytes(definition["model"])
            hidden = reserved | {self._unknown} | set(self._bytes or ())
            self._backends["beginning"] = Tokenizer.from_str(json.dumps(_without_names(definition, hidden)))

    @cached_property
    def blanks(self) -> dict[str, Start]:
        """How what follows is to be encoded where a text is cut at a blank, found by trying.

        A blank at which a cut would show in the tokens is missing.
        """
        starts: tuple[Start, ...] = ("blank", "within") if self._backends else ("beginning",)
        found = ((b, next((s for s in starts if self._same(f"x{b}x", "x", f"{b}x", s)), None)) for b in BLANKS)
        return {blank: start for blank, start in found if start is not None}

    @cached_property
    def cuts_words(self) -> bool:
        """Whether a text can be cut within a word: tokens may differ there, but their letters do not."""
        if not self._backends:
            return self._same("xx", "x", "x", "beginning")
        model = self._backends["beginning"].model
        marks = getattr(model, "continuing_subword_prefix", None) or getattr(model, "end_of_word_suffix", None)
        return isinstance(model, Unigram | BPE) and not marks

    def encode(self, texts: Sequence[str], start: Start = "beginning") -> list[NDArray[np.int32]]:
        """Encode texts, each as what `start` says: one int32 array each."""
        if not self._backends:
            tokens = (self._tokenizer.tokenize(text, split_special_tokens=True) for text in texts)
            return [np.array(self._tokenizer.convert_tokens_to_ids(t), dtype=np.int32) for t in tokens]
        backend = self._backend(start)
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        encoded = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        if self._bytes is not None:
            for n, ids in enumerate(encoded):
                if (ids == self._unknown).any():
                    encoded[n] = self._spelt_in_bytes(backend, texts[n])
        return encoded

    def _take_bytes(self, model: dict[str, Any]) -> None:
        """Note the unknown id and, of a Unigram model, the bytes, which are among the pieces that text may match."""
        if model["type"] != "Unigram":
            self._unknown = model["vocab"].get(model.get("unk_token"), -1)
            return
        self._unknown = -1 if model.get("unk_id") is None else model["unk_id"]
        ids = {token: i for i, (token, _) in enumerate(model["vocab"]) if _BYTE.fullmatch(token)}
        if model.get("byte_fallback") and len(ids) == 256:
            self._bytes = [ids[f"<0x{n:02X}>"] for n in range(256)]

    def _spelt_in_bytes(self, backend: Tokenizer, text: str) -> NDArray[np.int32]:
        """Encode a text with the bytes of what is unknown in it, as `byte_fallback` does by the bytes' names."""
        assert self._bytes is not None
        encoding = backend.encode(text, add_special_tokens=False)
        spelt: list[int] = []
        for i, piece in zip(encoding.ids, encoding.tokens, strict=True):
            spelt += [self._bytes[b] for b in piece.encode()] if i == self._unknown else [i]
        return np.array(spelt, dtype=np.int32)

    def _backend(self, start: Start) -> Tokenizer:
        if start not in self._backends:
            definition = json.loads(self._backends["beginning"].to_str())
            for part in ("normalizer", "pre_tokenizer"):
                definition[part] = _going_on(definition[part], start)
            self._backends[start] = Tokenizer.from_str(json.dumps(definition))
        return self._backends[start]

    def _same(self, whole: str, head: str, tail: str, start: Start) -> bool:
        (expected,), (first,), (second,) = self.encode([whole]), self.encode([head]), self.encode([tail], start)
        return np.array_equal(expected, np.concatenate([first, second]))


def _without_names(definition: dict[str, Any], ids: frozenset[int] | set[int]) -> dict[str, Any]:
    """Give tokens names that no text has: two of the code points that are never characters, around the id."""
    model, names = definition["model"], {i: f"\ufdd0{i}\ufdd1" for i in ids}
    if model["type"] == "Unigram":
        model["vocab"] = [[names.get(i, token), score] for i, (token, score) in enumerate(model["vocab"])]
    else:
        hidden = {token: names[i] for token, i in model["vocab"].items() if i in names}
        model["vocab"] = {hidden.get(token, token): i for token, i in model["vocab"].items()}
        if "unk_token" in model:
            model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
        if "merges" in model:  # none may make a hidden token, or a byte
            pairs = (tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"])
            model["merges"] = [
                [a, b]
                for a, b in pairs
                if not {a, b, a + b} & hidden.keys() and not any(map(_BYTE.fullmatch, (a, b, a + b)))
            ]
    for token in definition["added_tokens"]:
        token["content"] = names.get(token["id"], token["content"])
    return definition | {"truncation": None, "padding": None}


def _going_on(step: Any, start: Start) -> Any:
    """Change a normalizer or pre-tokenizer to one for what follows in a document, which puts no space before it.

    From a blank on, a prefix takes the blank's place, as between words, or is none where the blank is kept.
    """
    if isinstance(step, list):
        return [_going_on(s, start) for s in step]
    if not isinstance(step, dict):
        return step
    if step.get("type") == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    changed = {key: _going_on(value, start) for key, value in step.items()}
    if start == "within":
        without = {"prepend_scheme": "never", "add_prefix_space": False}
        changed |= {key: without[key] for key in without.keys() & step.keys()}
    return changed
