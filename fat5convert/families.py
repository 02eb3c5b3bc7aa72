"""The T5 families as data: what is supported, how each is told from the others, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fat5convert.layout import Layout


class Family(NamedTuple):
    """A supported `model_type`, with what its stock config class assumes when the file is silent."""

    title: str
    per_layer_bias: bool
    may_scale: bool
    feed_forward_proj: str
    tokenizer_class: str


FAMILIES: dict[str, Family] = {
    "t5": Family("T5", per_layer_bias=False, may_scale=True, feed_forward_proj="relu", tokenizer_class="T5Tokenizer"),
    "mt5": Family("mT5", False, False, "gated-gelu", "T5Tokenizer"),
    "umt5": Family("umT5", True, False, "gated-gelu", "T5Tokenizer"),
}


class Variant(NamedTuple):
    """A kind of checkpoint: a model type, and the config fields that tell it (None: whatever their value).

    Only the title depends on it; what a model computes is read from its config and tensors, never from its name.
    """

    title: str
    model_type: str
    examples: str
    particular: str
    marks: Mapping[str, Any] = {}


# The first whose every mark the config bears gives the title; the marks of later rows are weaker.
VARIANTS: tuple[Variant, ...] = (
    Variant(
        "Chronos-T5", "t5", "amazon/chronos-t5", "tied, 4096 bins, no text tokenizer", marks={"chronos_config": None}
    ),
    Variant("ByT5", "t5", "google/byt5", "bytes, encoder deeper than decoder", {"tokenizer_class": "ByT5Tokenizer"}),
    Variant("ByT5", "t5", "", "", {"vocab_size": 384}),
    Variant("CodeT5", "t5", "Salesforce/codet5", "eos 2, bos 1", {"bos_token_id": 1, "eos_token_id": 2}),
    Variant("ProtT5", "t5", "Rostlab/prot_t5_xl", "also its half-precision encoder", {"vocab_size": 128}),
    Variant("Ankh", "t5", "ElnaggarLab/ankh", "64 buckets", {"relative_attention_num_buckets": 64}),
    Variant("UL2", "t5", "google/ul2, google/flan-ul2", "gated-silu", {"feed_forward_proj": "gated-silu"}),
    Variant(
        "MADLAD-400",
        "t5",
        "google/madlad400",
        "no `shared`, pad is not decoder_start",
        {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0},
    ),
    Variant(
        "T5 v1.1",
        "t5",
        "google/t5-v1_1, FLAN-T5, T0, LM-adapted T5",
        "untied, unscaled head",
        {"feed_forward_proj": "gated-gelu"},
    ),
    Variant("T5 v1.0", "t5", "google-t5/t5-base, google/t5-efficient, GTR, Sentence-T5", "tied head, scaled"),
    Variant("mT5", "mt5", "google/mt5", "untied, unscaled head"),
    Variant("Pile-T5", "umt5", "EleutherAI/pile-t5", "bias per layer, eos 2", {"eos_token_id": 2}),
    Variant("umT5", "umt5", "google/umt5, Wan's text encoder", "bias per layer, often no `model_type`"),
    Variant(
        "FAT5",
        "flash_t5",
        "CATIE-AQ/FAT5",
        "published FAT5, heads included, but not with RoPE; its code files are replaced",
    ),
)

# Model types that people may take for a T5, and why they are none.
REFUSED: dict[str, str] = {
    "bert": "BERT is an encoder with absolute positions",
    "roberta": "RoBERTa is an encoder with absolute positions",
    "gpt2": "GPT-2 is a decoder with absolute positions",
    "bart": "BART has absolute positions and biases in its layers",
    "mbart": "mBART has absolute positions and biases in its layers",
    "m2m_100": "M2M-100 and NLLB have absolute positions and biases in their layers",
    "marian": "Marian has absolute positions and biases in its layers",
    "pegasus": "Pegasus has absolute positions and biases in its layers",
    "pegasus_x": "PEGASUS-X has absolute positions and block-local attention",
    "prophetnet": "ProphetNet predicts several tokens at once, with biases in its layers",
    "encoder-decoder": "this encoder-decoder is made of two other models",
    "longt5": "LongT5 has local or transient-global attention",
    "switch_transformers": "Switch Transformers has a mixture of experts",
    "t5gemma": "T5Gemma is an encoder-decoder of Gemma layers with rotary positions",
    "t5gemma2": "T5Gemma 2 is an encoder-decoder of Gemma layers with rotary positions",
    "udop": "UDOP adds image patches and two-dimensional position biases",
    "pop2piano": "Pop2Piano takes spectrograms, through a conditioned embedding",
    "pix2struct": "Pix2Struct has an image encoder",
}
FAT5_ALREADY = "this is a FAT5 model already (`fat5convert export` leads back to a stock T5)"


def title(model_type: str, raw: Mapping[str, Any], layout: Layout) -> str:
    """Name of the variant that a config describes, for people."""

    def bears(marks: Mapping[str, Any]) -> bool:
        return all(key in raw and (value is None or raw[key] == value) for key, value in marks.items())

    name = next(v.title for v in VARIANTS if v.model_type == model_type and bears(v.marks))
    # Any other gate is v1.1's as well.
    if name == "T5 v1.0" and str(raw.get("feed_forward_proj")).startswith("gated-"):
        name = "T5 v1.1"
    if layout.head is not None:
        return f"{name} for {layout.head.title}"
    return f"{name} encoder" if layout.encoder_only else name


def family_table() -> str:
    """What is supported, as a table in Markdown: that of the README, and of `fat5convert --list-families`."""
    rows = [(v.title, f"`{v.model_type}`", v.examples, v.particular) for v in VARIANTS if v.examples]
    head = ("family", "model_type", "for example", "particular")
    lines = [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]
    return "\n".join(lines)
