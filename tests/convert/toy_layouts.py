"""Small checkpoints in the layouts of other publishers than transformers: encoders, single files, other names."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from toy_checkpoints import SIZES, TOKENS
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def make_encoder(model_type: str = "t5", **changes: Any) -> Any:
    """A stock encoder whose every tensor is random and distinct."""
    config_class, model_class = {"t5": (T5Config, T5EncoderModel), "umt5": (UMT5Config, UMT5EncoderModel)}[model_type]
    model = model_class(config_class(**(SIZES | TOKENS | GATED | changes))).eval()
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.ndim == 1), 0.2, generator=generator)
    return model


def encoder_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Its tensors, the embedding under its one name."""
    return {name: t.detach().clone() for name, t in model.state_dict().items() if "embed_tokens" not in name}


def write_config(path: Path, model: Any) -> Path:
    """The config that `--config` names."""
    raw = model.config.to_dict() | {"tie_word_embeddings": False}
    path.write_text(json.dumps(raw))
    return path


def write_wan(path: Path, model: Any) -> Path:
    """A `.pth` as Wan publishes its umT5 encoder: the names of `wan/modules/t5.py`."""
    names = {"shared.weight": "token_embedding.weight", "encoder.final_layer_norm.weight": "norm.weight"}
    for n in range(model.config.num_layers):
        t5, wan = f"encoder.block.{n}.layer", f"blocks.{n}"
        for letter in "qkvo":
            names[f"{t5}.0.SelfAttention.{letter}.weight"] = f"{wan}.attn.{letter}.weight"
        names |= {
            f"{t5}.0.SelfAttention.relative_attention_bias.weight": f"{wan}.pos_embedding.embedding.weight",
            f"{t5}.0.layer_norm.weight": f"{wan}.norm1.weight",
            f"{t5}.1.layer_norm.weight": f"{wan}.norm2.weight",
            f"{t5}.1.DenseReluDense.wi_0.weight": f"{wan}.ffn.gate.0.weight",
            f"{t5}.1.DenseReluDense.wi_1.weight": f"{wan}.ffn.fc1.weight",
            f"{t5}.1.DenseReluDense.wo.weight": f"{wan}.ffn.fc2.weight",
        }
    torch.save({names[name]: tensor for name, tensor in encoder_tensors(model).items()}, path)
    return path


def write_image_model(path: Path, model: Any, *, embed_tokens: bool, dtype: torch.dtype = torch.float16) -> Path:
    """A single file of an image model: its T5 behind a prefix, among the tensors of the other parts."""
    tensors = encoder_tensors(model)
    if embed_tokens:
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    prefix = "text_encoders.t5xxl.transformer."
    file = {prefix + name: tensor.to(dtype) for name, tensor in tensors.items()}
    file |= {
        "model.diffusion_model.x_embedder.proj.weight": torch.randn(4, 4),
        "first_stage_model.decoder.conv_in.weight": torch.randn(3, 3),
        "text_encoders.clip_l.transformer.text_model.embeddings.position_embedding.weight": torch.randn(5, 5),
    }
    save_file(file, path)
    return path


def write_published_fat5(folder: Path, stock: Path, **changes: Any) -> Path:
    """A stock T5 v1.1 folder as CATIE-AQ publishes adapted ones: FAT5 names, its own config fields, stale values."""
    from safetensors.torch import load_file

    renamed = {}
    for name, tensor in load_file(stock / "model.safetensors").items():
        for old, new in (
            ("layer.0.SelfAttention.relative_attention_bias", "L0.self_attention.pe_encoding.relative_attention_bias"),
            ("layer.0.SelfAttention.o", "L0.self_attention.o"),
            ("layer.1.EncDecAttention.o", "L1.cross_attention.o"),
            *((f"layer.0.SelfAttention.{x}", f"L0.self_attention.W{x}") for x in "qkv"),
            *((f"layer.1.EncDecAttention.{x}", f"L1.cross_attention.W{x}") for x in "qkv"),
            ("layer.0.layer_norm", "L0.layer_norm"),
            *(((f"layer.{2 if name.startswith('decoder') else 1}.{x}"), f"L2.{y}") for x, y in (
                ("layer_norm", "layer_norm"), ("DenseReluDense.wo", "wo"), ("DenseReluDense.wi", "act.wi"))),
            ("layer.1.layer_norm", "L1.layer_norm"),
        ):  # fmt: skip
            name = name.replace(old, new)
        for old, new in (("L0", "self_attention_layer"), ("L1", "cross_attention_layer"), ("L2", "ff_layer")):
            name = name.replace(f".{old}.", f".{new}.")
        renamed[name] = tensor
    for copy in ("encoder", "decoder"):
        renamed[f"{copy}.embed_tokens.weight"] = renamed["shared.weight"].clone()
    if changes.get("position_encoding_type", "t5") != "t5":
        _replace_tables(renamed, changes)
    folder.mkdir()
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    raw = json.loads((stock / "config.json").read_text())
    kept = {key: raw[key] for key in (*SIZES, "relative_attention_num_buckets", "eos_token_id", "layer_norm_epsilon")}
    published = {
        "model_type": "flash_t5",
        "architectures": ["FlashT5ForConditionalGeneration"],
        "auto_map": {"AutoModel": "modeling_flash_t5.FlashT5ForConditionalGeneration"},
        "feed_forward_proj": "relu",
        "is_gated_act": False,
        "dense_act_fn": "relu",
        "use_glu_mlp": True,
        "use_gelu_act": True,
        "attention_scale": 1.0,
        "attention_type": "triton",
        "position_encoding_type": "t5",
        "is_encoder_decoder": False,
        "pad_token_id": -100,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": False,
        "z_loss": 0.0001,
        "max_sequence_length": 1024,
    }
    (folder / "config.json").write_text(json.dumps(kept | published | changes))
    (folder / "modeling_flash_t5.py").write_text("raise RuntimeError('the published code must not run')\n")
    return folder


def _replace_tables(tensors: dict[str, torch.Tensor], changes: dict[str, Any]) -> None:
    """FIRE has its parameters where T5 has its table; the other positions have none."""
    generator = torch.Generator().manual_seed(11)
    for name in [name for name in tensors if "relative_attention_bias" in name]:
        heads = tensors.pop(name).shape[1]
        if changes["position_encoding_type"] == "FIRE":
            width = changes["fire_mlp_width"]
            shapes = {"0.weight": (width, 1), "0.bias": (width,), "2.weight": (heads, width), "2.bias": (heads,)}
            fire = {f"mlp.{part}": torch.randn(shape, generator=generator) for part, shape in shapes.items()}
            # An integer, as the published module makes it from the config.
            fire |= {"c": torch.tensor(0.3), "init_L": torch.tensor(20), "L_multiplier": torch.tensor(-1.2)}
            tensors |= {name.replace("relative_attention_bias.weight", part): value for part, value in fire.items()}
