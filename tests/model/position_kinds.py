"""Every kind of positions at toy size, and models with them whose every weight matters."""

import torch
from model_parity import SHAPE

from fat5.model import FlashT5Config, FlashT5ForConditionalGeneration

KINDS = {
    "t5": {"position_encoding_type": "t5"},
    "none": {"position_encoding_type": "none"},
    "alibi": {"position_encoding_type": "ALiBi"},
    "alibi_asymmetric": {"position_encoding_type": "ALiBi", "alibi_mode": "asymmetric"},
    "rope": {"position_encoding_type": "RoPE"},
    "rope_interleaved_part": {
        "position_encoding_type": "RoPE",
        "rotary_interleaved": True,
        "rotary_emb_fraction": 0.7,
        "rotary_base": 50,
    },
    "xpos": {"position_encoding_type": "RoPE", "rotary_scale_base": 32, "max_sequence_length": 64},
    "fire": {
        "position_encoding_type": "FIRE",
        "fire_mlp_width": 5,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 6,  # L, which sequences exceed
    },
}


def kind_model(kind, implementation="eager", **fields):
    """A model whose positions are of this kind, the same weights for every implementation."""
    fields = {**SHAPE, "feed_forward_proj": "gated-gelu", **KINDS[kind], **fields}
    model = FlashT5ForConditionalGeneration(FlashT5Config(**fields, attn_implementation=implementation)).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "pe_encoding.mlp" in name or "relative_attention_bias" in name or "shared" in name:
                weight.copy_(noise)
            elif weight.ndim == 2:
                weight.copy_(1.2 * weight.shape[1] ** -0.5 * noise)
            elif weight.ndim == 1:
                weight.copy_(1 + 0.2 * noise)
            elif weight.requires_grad:  # FIRE's c and multiplier of L
                weight.mul_(1 + 0.2 * noise)
    return model
