"""Train a tokenizer with T5's layout of ids: pad 0, EOS 1, unk 2, pieces, mode tokens, sentinels counting down."""

import json
import re
from collections.abc import Iterable
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_FIRST = ("<pad>", "</s>", "<unk>")
MODE_TOKENS = ("[R]", "[S]", "[X]")
_BYTES = tuple(f"<0x{n:02X}>" for n in range(256))
#: Matches inside every name of a special token or byte, in use or not. Text is cut there before it teaches pieces, so
#: that none is such a name or holds one.
INSIDE_NAMES = r"(?<=<)(?=/s>|pad>|unk>|0x[0-9A-F]{2}>|extra_id_\d+>)|(?<=\[)(?=[RSX]\])"

# Where words longer than any are cut for training.
_LONG_WORD = re.compile(r"\S{250}(?=\S)")


def train_tokenizer(
    documents: Iterable[str],
    kind: Literal["unigram", "bpe"],
    size: int,
    *,
    sentinels: int = 100,
    mode_tokens: bool = True,
    byte_fallback: bool = True,
) -> PreTrainedTokenizerFast:
    """Train a tokenizer.

    Text is normalised as T5's is (NFKC, no space at the ends, runs of spaces made one), and a space becomes `▁` at the
    start of a piece. No piece spells a special token or byte, whatever the text holds.

    Args:
        documents: the text.
        kind: the algorithm.
        size: most ids in all, special tokens, bytes and sentinels included; fewer where the text has no more pieces.
        sentinels: how many `<extra_id_N>`, 100 to 300 as a rule; `<extra_id_0>` is the last id.
        mode_tokens: whether `[R]`, `[S]` and `[X]` have ids of their own.
        byte_fallback: spell characters that are not in the vocabulary as bytes instead of `<unk>`.

    Raises:
        ValueError: `size` leaves too little for pieces, or there is no text.
    """
    special = [*(MODE_TOKENS if mode_tokens else ()), *(f"<extra_id_{n}>" for n in reversed(range(sentinels)))]
    head = [*_FIRST, *(_BYTES if byte_fallback else ())]
    pieces = size - len(head) - len(special)
    if pieces < 100:
        raise ValueError(
            f"a vocabulary of {size} leaves {max(pieces, 0)} pieces beside {len(head) + len(special)} special tokens"
            " and bytes; make it larger"
        )
    model = _train_unigram(documents, pieces) if kind == "unigram" else _train_bpe(documents, pieces)
    definition = _assemble(model, head, special, byte_fallback)
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    last = tokenizer.get_vocab_size() - len(special)
    for first, tokens in ((0, head), (last, special)):
        assert [tokenizer.token_to_id(t) for t in tokens] == list(range(first, first + len(tokens)))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # alone: the cuts cost a third of the speed
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    # Named one by one: how a list of further special tokens is called differs between releases of transformers.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=10**9,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def _blank(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(Regex(INSIDE_NAMES), "removed")]
    )
    return tokenizer


def train(tokenizer: Tokenizer, documents: Iterable[str], trainer: trainers.Trainer) -> None:
    """Train a tokenizer in place. Words of more than 250 characters teach it in parts of so many.

    Raises:
        ValueError: the vocabulary is too small for the text's characters.
    """
    # Broken surrogates, which JSON can spell, have no UTF-8 form. The trainers take a word's square in time, or crash.
    texts = (_LONG_WORD.sub(r"\g<0> ", text.encode("utf-8", "replace").decode("utf-8")) for text in documents)
    try:
        tokenizer.train_from_iterator(texts, trainer)
    except ValueError:  # the documents cannot be read
        raise
    except Exception as error:  # `tokenizers` has no class of its own for what it refuses
        raise ValueError(f"the tokenizer cannot be trained: {error}") from error


def _train_unigram(documents: Iterable[str], pieces: int) -> dict[str, Any]:
    tokenizer = _blank(models.Unigram())
    trainer = trainers.UnigramTrainer(
        vocab_size=pieces + 1, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    train(tokenizer, documents, trainer)
    definition: dict[str, Any] = json.loads(tokenizer.to_str())
    definition["model"]["vocab"] = [entry for entry in definition["model"]["vocab"] if entry[0] != "<unk>"]
    if not definition["model"]["vocab"]:
        raise ValueError("there is no text to train a tokenizer on")
    return definition


def _train_bpe(documents: Iterable[str], pieces: int) -> dict[str, Any]:
    tokenizer = _blank(models.BPE())
    train(tokenizer, documents, trainers.BpeTrainer(vocab_size=pieces, show_progress=False))
    definition: dict[str, Any] = json.loads(tokenizer.to_str())
    if not definition["model"]["vocab"]:
        raise ValueError("there is no text to train a tokenizer on")
    return definition


def _assemble(definition: dict[str, Any], head: list[str], special: list[str], byte_fallback: bool) -> dict[str, Any]:
    """Put head and special tokens around the trained pieces, and renumber."""
    model = definition["model"]
    if model["type"] == "Unigram":
        lowest = min((score for _, score in model["vocab"]), default=0.0) - 10.0
        model["vocab"] = [[t, 0.0] for t in _FIRST] + [[t, lowest] for t in head[len(_FIRST) :]] + model["vocab"]
        model["unk_id"] = head.index("<unk>")
        count = len(model["vocab"])
    else:
        trained = sorted(model["vocab"], key=model["vocab"].__getitem__)
        model["vocab"] = {token: n for n, token in enumerate([*head, *trained])}
        model["unk_token"] = "<unk>"
        count = len(model["vocab"])
    model["byte_fallback"] = byte_fallback
    steps = [decoders.Replace("▁", " "), *([decoders.ByteFallback()] if byte_fallback else []), decoders.Fuse()]
    decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    definition["decoder"] = json.loads(decoder.__getstate__())
    added = [*((token, n) for n, token in enumerate(_FIRST)), *((t, count + n) for n, t in enumerate(special))]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    definition["added_tokens"] = [{"id": n, "content": token, **flags} for token, n in added]
    return definition
