"""Extend the vocabulary of an existing T5 tokenizer, and give its model rows for the new pieces."""

import json
import math
import re
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, models, trainers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fat5.data.train_tokenizer import INSIDE_NAMES, MODE_TOKENS, train

# New pieces are picked from a trained vocabulary this many times larger than what is wanted, and at least so large.
_CANDIDATES = 4
_LEAST_CANDIDATES = 8000


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], new_pieces: int
) -> tuple[PreTrainedTokenizerFast, dict[int, list[int]]]:
    """Add the pieces that shorten a text most to a Unigram tokenizer; no id that exists changes.

    The three mode tokens take the first new ids, the free rows of the padded embedding in which they also are when the
    tokenizer is not extended; the new pieces follow.

    Args:
        tokenizer: a fast tokenizer with a Unigram model, as all T5 tokenizers based on SentencePiece are.
        documents: text of the new domain or language.
        new_pieces: how many pieces to add at most.

    Returns:
        The new tokenizer, and for each new piece's id the ids that spelt it before.

    Raises:
        ValueError: the tokenizer is not Unigram.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, models.Unigram):
        raise ValueError(
            f"{type(tokenizer).__name__} has no Unigram model; only SentencePiece Unigram vocabularies (T5, mT5, umT5,"
            " and those of `fat5 train-tokenizer --kind unigram`) can be extended"
        )
    known = tokenizer.get_vocab()
    definition = json.loads(backend.to_str())
    unknown = definition["model"]["unk_id"]
    spellings = {
        piece: (score, old)
        for piece, score in _train_pieces(backend, documents, max(_LEAST_CANDIDATES, _CANDIDATES * new_pieces))
        if piece not in known and len(old := [t.id for t in backend.model.tokenize(piece)]) > 1 and unknown not in old
    }
    # What a piece saves: how often it comes, times the tokens it makes unnecessary.
    best = sorted(spellings, key=lambda p: -math.exp(spellings[p][0]) * (len(spellings[p][1]) - 1))[:new_pieces]
    vocabulary = definition["model"]["vocab"]
    modes = [m for m in MODE_TOKENS if m not in known]
    first = max(len(tokenizer), 1 + max(known.values())) + len(modes)
    # Unigram numbers its pieces from 0 on, so the ids of special tokens above them become pieces that never win.
    named = {i: token for token, i in known.items()} | {first - len(modes) + n: mode for n, mode in enumerate(modes)}
    never = min(score for _, score in vocabulary) - 100.0
    vocabulary += [[named.get(n, f"<unused_{n}>"), never] for n in range(len(vocabulary), first)]
    scores = {i: score for i, (_, score) in enumerate(vocabulary)}
    parts = {}
    for n, piece in enumerate(best):
        score, old = spellings[piece]
        # It must win over what spelt it before.
        vocabulary.append([piece, max(score, sum(scores[i] for i in old) + 0.1)])
        parts[first + n] = old
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for n, mode in enumerate(modes):
        definition["added_tokens"].append({"id": first - len(modes) + n, "content": mode, **flags})
    extended = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)),
        pad_token=tokenizer.pad_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        model_max_length=tokenizer.model_max_length,
        model_input_names=["input_ids", "attention_mask"],
    )
    return extended, parts


def _train_pieces(backend: Tokenizer, documents: Iterable[str], count: int) -> list[tuple[str, float]]:
    """Train a Unigram vocabulary with the old one's normalisation: pieces and their log probabilities."""
    trained = Tokenizer(models.Unigram())
    trained.normalizer, trained.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    trainer = trainers.UnigramTrainer(
        vocab_size=count, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    train(trained, documents, trainer)
    pieces = json.loads(trained.to_str())["model"]["vocab"]
    return [(p, s) for p, s in pieces if p != "<unk>" and not re.search(INSIDE_NAMES, p)]


def extend_model(model: PreTrainedModel, rows: int, parts: dict[int, list[int]]) -> None:
    """Give a model embedding rows for new pieces: each the mean of the rows of the ids that spelt it before.

    Rows that are new and belong to no piece get the mean of all old ones. The output head, where it is a matrix of
    its own, is treated alike.

    Args:
        model: changed in place.
        rows: rows that the tokenizer needs; an embedding that has more keeps them.
        parts: new id -> old ids.
    """
    old_rows = _weight(model.get_input_embeddings()).shape[0]
    if rows > old_rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        for table in {id(w): w for w in map(_weight, filter(None, layers))}.values():
            table[old_rows:] = table[:old_rows].float().mean(0).to(table.dtype)
            for new, old in parts.items():
                table[new] = table[old].float().mean(0).to(table.dtype)


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight
