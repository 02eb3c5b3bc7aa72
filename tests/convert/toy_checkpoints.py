"""Small stock T5 checkpoints of every family, written by stock transformers in each family's true layout."""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

# inner_dim (3 * 8) is not d_model (32) anywhere; the decoder's depth differs.
SIZES = {
    "vocab_size": 120,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 3,
}
TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}


@dataclass(frozen=True)
class Shape:
    """How a family's checkpoints look."""

    config_class: type
    model_class: type
    fields: dict[str, Any] = field(default_factory=dict)
    untied: bool = True
    scaled: bool = False
    drop_from_config: tuple[str, ...] = ()
    title: str = ""


FAMILIES = {
    "t5-v1.0": Shape(
        T5Config, T5ForConditionalGeneration, {"feed_forward_proj": "relu"}, untied=False, scaled=True, title="T5 v1.0"
    ),
    "t5-v1.1": Shape(T5Config, T5ForConditionalGeneration, {"feed_forward_proj": "gated-gelu"}, title="T5 v1.1"),
    "mt5": Shape(MT5Config, MT5ForConditionalGeneration, {"feed_forward_proj": "gated-gelu"}, title="mT5"),
    "umt5": Shape(
        UMT5Config,
        UMT5ForConditionalGeneration,
        {
            "feed_forward_proj": "gated-gelu",
            "relative_attention_num_buckets": 16,
            "relative_attention_max_distance": 60,
        },
        drop_from_config=("model_type", "architectures"),
        title="umT5",
    ),
    "byt5": Shape(
        T5Config,
        T5ForConditionalGeneration,
        {"feed_forward_proj": "gated-gelu", "vocab_size": 384, "num_layers": 6, "tokenizer_class": "ByT5Tokenizer"},
        title="ByT5",
    ),
}


def make_model(family: str, spread: float | None = 0.2, **changes: Any) -> Any:
    """A stock model whose every tensor is random and distinct; an untied head is assigned by hand, as stock ties it.

    `spread` is the weights' standard deviation; None keeps T5's own initialisation.
    """
    shape = FAMILIES[family]
    kwargs = SIZES | TOKENS | shape.fields | changes
    if shape.config_class is T5Config:
        kwargs["tie_word_embeddings"] = not shape.untied
    model = shape.model_class(shape.config_class(**kwargs)).eval()
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(sum(family.encode()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if spread is None:
                continue
            if parameter.ndim > 1:
                parameter.normal_(0.0, spread, generator=generator)
            else:
                parameter.normal_(1.0, 0.1, generator=generator)
            if "relative_attention_bias" in name:
                parameter.mul_(5)
        if shape.untied:
            model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape, generator=generator))
    return model


def write_checkpoint(
    folder: Path, family: str, *, dialect: int = 4, weights: str = "safetensors", sharded: bool = False, **changes: Any
) -> Path:
    """Write a family's checkpoint as transformers 4 or 5 would have, with the weights in either format."""
    shape, model = FAMILIES[family], make_model(family, **changes)
    model.save_pretrained(folder, max_shard_size="20KB" if sharded else "1GB")
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is True, "transformers 5 writes true whatever the model"
    if dialect == 4:
        config.pop("scale_decoder_outputs", None)
        config.pop("dtype", None)
        config["torch_dtype"] = "float32"
        if shape.untied:
            config["tie_word_embeddings"] = False
        else:
            del config["tie_word_embeddings"]
    for key in shape.drop_from_config:
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    if weights == "bin":
        _to_bin(folder, sharded)
    assert ("lm_head.weight" in all_tensors(folder)) is (shape.untied or weights == "bin")
    return folder


def _to_bin(folder: Path, sharded: bool) -> None:
    """Rewrite as `pytorch_model.bin`, with the copies of the embedding that transformers 4 wrote there."""
    tensors = all_tensors(folder)
    for path in folder.glob("model*"):
        path.unlink()
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        tensors.setdefault(name, tensors["shared.weight"])
    if not sharded:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    names = list(tensors)
    shards = [names[i::3] for i in range(3)]
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"pytorch_model-{i:05d}-of-00003.bin"
        torch.save({name: tensors[name].clone() for name in shard}, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def pieces() -> bytes:
    """A small SentencePiece model."""
    model = io.BytesIO()
    text = ["the old cat sees a dog", "one bird finds two trees"]
    options = {"vocab_size": 30, "hard_vocab_limit": False, "minloglevel": 2}
    SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=model, **options)
    return model.getvalue()


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, read by the safetensors library or torch: not by the converter."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    for path in sorted(folder.glob("*.bin")):
        tensors |= torch.load(path, weights_only=True)
    return tensors


def rewrite(folder: Path, change: Any) -> None:
    """Apply a change to the tensors of a one-file checkpoint, in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
