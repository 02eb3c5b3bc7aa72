"""THE table: the names of every kind of tensor, its shape, and where it exists.

Conversion reads it left to right, export right to left; nothing else in the converter knows a tensor name.
T5 names are those of `transformers` (`models/t5/modeling_t5.py`, Apache-2.0), FAT5 names those of the published
CATIE-AQ/FAT5 checkpoints, Wan names those of Wan 2.1's text encoder (`wan/modules/t5.py` in
https://github.com/Wan-Video/Wan2.1, Apache-2.0). `NAMINGS` says in which forms files carry them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from fat5convert.errors import ConvertError, some
from fat5convert.heads import Task
from fat5convert.layout import Layout, Where
from fat5convert.source import Checkpoint

Column = Literal["t5", "fat5", "wan"]


class Row(NamedTuple):
    """One kind of tensor. `{s}` stands for encoder and decoder, `{n}` for the layer; shapes name sizes of a layout."""

    t5: str
    fat5: str
    shape: tuple[str | int, ...]
    where: Where = "always"

    @property
    def is_head(self) -> bool:
        """Whether it belongs to a head other than the language model's: in stock files no prefix goes before it."""
        return self.where in get_args(Task)


_T5_SELF, _FAT5_SELF = "{s}.block.{n}.layer.0", "{s}.block.{n}.self_attention_layer"
_T5_CROSS, _FAT5_CROSS = "decoder.block.{n}.layer.1", "decoder.block.{n}.cross_attention_layer"
_T5_FF, _FAT5_FF = "{s}.block.{n}.layer.{ff}", "{s}.block.{n}.ff_layer"
_T5_BIAS = "SelfAttention.relative_attention_bias.weight"
_FAT5_BIAS = "self_attention.pe_encoding.relative_attention_bias.weight"


def _fire(name: str, *shape: str | int) -> Row:
    """A parameter of FIRE, which stock T5 does not have: its T5 name is that in the oracle of `published_bias`."""
    t5, fat5 = f"{_T5_SELF}.SelfAttention.relative_attention_bias", f"{_FAT5_SELF}.self_attention.pe_encoding"
    return Row(f"{t5}.{name}", f"{fat5}.{name}", shape, "FIRE")


def _head(name: str, task: Task, *shape: str | int) -> Row:
    """A parameter of a head other than the language model's."""
    return Row(name, name, shape, task)


EMBEDDING = Row("shared.weight", "shared.weight", ("vocab_size", "d_model"))
STACKS: tuple[Row, ...] = (
    # Self-attention of both stacks.
    Row(f"{_T5_SELF}.SelfAttention.q.weight", f"{_FAT5_SELF}.self_attention.Wq.weight", ("inner_dim", "d_model")),
    Row(f"{_T5_SELF}.SelfAttention.k.weight", f"{_FAT5_SELF}.self_attention.Wk.weight", ("inner_dim", "d_model")),
    Row(f"{_T5_SELF}.SelfAttention.v.weight", f"{_FAT5_SELF}.self_attention.Wv.weight", ("inner_dim", "d_model")),
    Row(f"{_T5_SELF}.SelfAttention.o.weight", f"{_FAT5_SELF}.self_attention.o.weight", ("d_model", "inner_dim")),
    Row(f"{_T5_SELF}.{_T5_BIAS}", f"{_FAT5_SELF}.{_FAT5_BIAS}", ("num_buckets", "num_heads"), "bias"),
    _fire("mlp.0.weight", "fire_mlp_width", 1),
    _fire("mlp.0.bias", "fire_mlp_width"),
    _fire("mlp.2.weight", "num_heads", "fire_mlp_width"),
    _fire("mlp.2.bias", "num_heads"),
    _fire("c"),
    _fire("init_L"),
    _fire("L_multiplier"),
    Row(f"{_T5_SELF}.layer_norm.weight", f"{_FAT5_SELF}.layer_norm.weight", ("d_model",)),
    # Cross-attention of the decoder.
    Row(f"{_T5_CROSS}.EncDecAttention.q.weight", f"{_FAT5_CROSS}.cross_attention.Wq.weight", ("inner_dim", "d_model")),
    Row(f"{_T5_CROSS}.EncDecAttention.k.weight", f"{_FAT5_CROSS}.cross_attention.Wk.weight", ("inner_dim", "d_model")),
    Row(f"{_T5_CROSS}.EncDecAttention.v.weight", f"{_FAT5_CROSS}.cross_attention.Wv.weight", ("inner_dim", "d_model")),
    Row(f"{_T5_CROSS}.EncDecAttention.o.weight", f"{_FAT5_CROSS}.cross_attention.o.weight", ("d_model", "inner_dim")),
    Row(f"{_T5_CROSS}.layer_norm.weight", f"{_FAT5_CROSS}.layer_norm.weight", ("d_model",)),
    # Feed-forward: the second sub-layer of an encoder block, the third of a decoder block.
    Row(f"{_T5_FF}.DenseReluDense.wi_0.weight", f"{_FAT5_FF}.act.wi_0.weight", ("d_ff", "d_model"), "gated"),
    Row(f"{_T5_FF}.DenseReluDense.wi_1.weight", f"{_FAT5_FF}.act.wi_1.weight", ("d_ff", "d_model"), "gated"),
    Row(f"{_T5_FF}.DenseReluDense.wi.weight", f"{_FAT5_FF}.act.wi.weight", ("d_ff", "d_model"), "plain"),
    Row(f"{_T5_FF}.DenseReluDense.wo.weight", f"{_FAT5_FF}.wo.weight", ("d_model", "d_ff")),
    Row(f"{_T5_FF}.layer_norm.weight", f"{_FAT5_FF}.layer_norm.weight", ("d_model",)),
    Row("{s}.final_layer_norm.weight", "{s}.final_layer_norm.weight", ("d_model",)),
)  # fmt: skip
LM_HEAD = Row("lm_head.weight", "lm_head.weight", ("vocab_size", "d_model"), "untied")
TASK_HEADS: tuple[Row, ...] = (
    _head("classification_head.dense.weight", "SequenceClassification", "d_model", "d_model"),
    _head("classification_head.dense.bias", "SequenceClassification", "d_model"),
    _head("classification_head.out_proj.weight", "SequenceClassification", "num_labels", "d_model"),
    _head("classification_head.out_proj.bias", "SequenceClassification", "num_labels"),
    _head("classifier.weight", "TokenClassification", "num_labels", "d_model"),
    _head("classifier.bias", "TokenClassification", "num_labels"),
    _head("qa_outputs.weight", "QuestionAnswering", "num_labels", "d_model"),
    _head("qa_outputs.bias", "QuestionAnswering", "num_labels"),
)

# T5 name -> Wan name: an encoder with a bias per layer and a gated feed-forward.
_WAN: dict[str, str] = {
    EMBEDDING.t5: "token_embedding.weight",
    f"{_T5_SELF}.SelfAttention.q.weight": "blocks.{n}.attn.q.weight",
    f"{_T5_SELF}.SelfAttention.k.weight": "blocks.{n}.attn.k.weight",
    f"{_T5_SELF}.SelfAttention.v.weight": "blocks.{n}.attn.v.weight",
    f"{_T5_SELF}.SelfAttention.o.weight": "blocks.{n}.attn.o.weight",
    f"{_T5_SELF}.{_T5_BIAS}": "blocks.{n}.pos_embedding.embedding.weight",
    f"{_T5_SELF}.layer_norm.weight": "blocks.{n}.norm1.weight",
    f"{_T5_FF}.DenseReluDense.wi_0.weight": "blocks.{n}.ffn.gate.0.weight",
    f"{_T5_FF}.DenseReluDense.wi_1.weight": "blocks.{n}.ffn.fc1.weight",
    f"{_T5_FF}.DenseReluDense.wo.weight": "blocks.{n}.ffn.fc2.weight",
    f"{_T5_FF}.layer_norm.weight": "blocks.{n}.norm2.weight",
    "{s}.final_layer_norm.weight": "norm.weight",
}


@dataclass(frozen=True)
class Naming:
    """A form in which files carry the tensors of the table: a column of it, behind a prefix.

    `in_company`: what lies outside the prefix is other parts of a larger model.
    """

    title: str
    column: Column
    prefix: str = ""
    in_company: bool = False

    def name(self, row: Row, **values: object) -> str:
        """The name in such a file of a row's tensor, with the row's placeholders filled by `values`."""
        template = {"t5": row.t5, "fat5": row.fat5, "wan": _WAN.get(row.t5, row.t5)}[self.column]
        return template if row.is_head else self.prefix + template.format(**values)

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Where such a file may hold the embedding; the first that it has stands for `shared.weight`."""
        copies = () if self.column == "wan" else ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
        return (self.name(EMBEDDING), *(self.prefix + copy for copy in copies))

    @property
    def marker(self) -> str:
        """A tensor that every such file has and no other."""
        return self.name(STACKS[0], s="encoder", n=0)


STOCK = Naming("transformers", "t5")
NAMINGS: tuple[Naming, ...] = (
    STOCK,
    Naming("transformers, the model behind a prefix", "t5", "transformer."),
    Naming("an image model's single file", "t5", "text_encoders.t5xxl.transformer.", in_company=True),
    Naming("a video model's single file", "t5", "text_encoders.umt5xxl.transformer.", in_company=True),
    Naming("Wan's text encoder", "wan"),
    Naming("published FAT5", "fat5"),
)


class Leftover(NamedTuple):
    """A T5 tensor that conversion may leave behind; `copy`: only if it holds the same bytes as the embedding."""

    name: str
    reason: str
    copy: bool = False


LEFTOVERS: tuple[Leftover, ...] = (
    Leftover("shared.weight", "a copy of the embedding", copy=True),
    Leftover("encoder.embed_tokens.weight", "a copy of the embedding", copy=True),
    Leftover("decoder.embed_tokens.weight", "a copy of the embedding", copy=True),
    Leftover("lm_head.weight", "the tied head, stored as a copy of the embedding", copy=True),
    Leftover(
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
        "dead: T5 adds no position bias in cross-attention",
    ),
    Leftover("spiece_model", "the tokenizer's SentencePiece model, which is no weight"),
)


@dataclass(frozen=True)
class Pair:
    """One tensor under all its names: in the file at hand, in stock T5 and in FAT5."""

    source: str
    t5: str
    fat5: str
    shape: tuple[int, ...]


def expand(layout: Layout, tensors: int, naming: Naming = STOCK) -> list[Pair]:
    """Write the table out for one model: every tensor that it has, under all its names, in the model's order.

    Args:
        layout: the model.
        tensors: how many tensors the file holds, so that an absurd depth costs nothing.
        naming: the form of that file.

    Raises:
        ConvertError: the model has more layers than the file has tensors.
    """
    depths = {"encoder": layout.num_layers} | ({} if layout.encoder_only else {"decoder": layout.num_decoder_layers})
    if sum(depths.values()) > tensors:
        stated = f"num_layers {layout.num_layers}, num_decoder_layers {layout.num_decoder_layers}"
        raise ConvertError(f"{stated}: more layers than the file has tensors ({tensors})")
    pairs = _fill(EMBEDDING, layout, naming, "", 0)
    for stack, depth in depths.items():
        rows = [row for row in STACKS if "{s}" in row.t5 or row.t5.startswith(stack)]
        for layer in range(depth):
            for row in rows:
                if "{n}" in row.t5:
                    pairs += _fill(row, layout, naming, stack, layer)
        for row in rows:
            if "{n}" not in row.t5:
                pairs += _fill(row, layout, naming, stack, 0)
    for row in (LM_HEAD, *TASK_HEADS):
        pairs += _fill(row, layout, naming, "", 0)
    return pairs


def _fill(row: Row, layout: Layout, naming: Naming, stack: str, layer: int) -> list[Pair]:
    if not layout.has(row.where, layer):
        return []
    values = {"s": stack, "n": layer, "ff": 1 if stack == "encoder" else 2}
    shape = tuple(size if isinstance(size, int) else getattr(layout, size) for size in row.shape)
    t5 = ("" if row.is_head else layout.stock_prefix) + row.t5.format(**values)
    return [Pair(naming.name(row, **values), t5, row.fat5.format(**values), shape)]


def check(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], allowed: Collection[str] = ()) -> None:
    """Hold a checkpoint's tensors against what the table says it must contain.

    Args:
        checkpoint: whose tensors.
        expected: name -> shape of every tensor that must be there.
        allowed: names that may be there besides.

    Raises:
        ConvertError: tensors are missing, unknown or of a wrong shape; the message names them, and the files that
            they are in: whether these or the config are at fault cannot be known.
    """
    found = checkpoint.tensors
    placed = {name: f"{name} in {checkpoint.file_of(name).name}" for name in found}
    missing = [name for name in expected if name not in found]
    unknown = [placed[name] for name in found if name not in expected and name not in allowed]
    wrong = [
        f"{placed[name]} has shape {list(found[name].shape)}, the config asks for {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    problems = [
        f"{len(names)} {what}: {some(names)}"
        for what, names in (
            ("missing tensor(s)", missing),
            ("unknown tensor(s)", unknown),
            ("tensor(s) of wrong shape", wrong),
        )
        if names
    ]
    if problems:
        advice = "Correct the config, or download or save the weights again."
        what = f"the tensors do not fit {checkpoint.config_name}: {'; '.join(problems)}"
        raise ConvertError(f"{checkpoint.weights_name}: {what}. {advice}")
