"""How many floating-point operations a step needs, and how many a device could do."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch

from fat5.data.layout import example_lengths
from fat5.model.configuration_flash_t5 import FlashT5Config


@dataclass(frozen=True)
class Counts:
    """The sizes of one or more batches, from which tokens and operations follow.

    Attributes:
        encoder: real encoder tokens.
        decoder: real decoder tokens.
        places: tokens that were computed, padding included.
        encoder_pairs: sum over the examples of (encoder tokens)²: pairs that attend to each other.
        decoder_pairs: the same of the decoder.
        cross_pairs: sum over the examples of encoder tokens times decoder tokens.
    """

    encoder: int = 0
    decoder: int = 0
    places: int = 0
    encoder_pairs: int = 0
    decoder_pairs: int = 0
    cross_pairs: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def tokens(self) -> int:
        """Real tokens of both sides."""
        return self.encoder + self.decoder


def count(batch: Mapping[str, Any]) -> Counts:
    """Count a batch, in any of the layouts of `fat5.data.layout`."""
    encoder, decoder = example_lengths(batch)
    return Counts(
        encoder=int(encoder.sum()),
        decoder=int(decoder.sum()),
        places=batch["input_ids"].numel() + batch["labels"].numel(),
        encoder_pairs=int(encoder.square().sum()),
        decoder_pairs=int(decoder.square().sum()),
        cross_pairs=int((encoder * decoder).sum()),
    )


def training_flops(config: FlashT5Config, counts: Counts) -> int:
    """Count the operations of forward and backward on real tokens.

    Chowdhery et al. (2022), "PaLM", appendix B, https://arxiv.org/abs/2204.02311: two operations for each weight of a
    matrix product and token, and four for each pair of tokens, layer and attention channel; the backward pass costs
    twice the forward. Written out for an encoder and a decoder, where cross-attention's keys and values are made of the
    encoder's tokens. As there, causal attention counts in full, and what is recomputed does not count.
    """
    d, inner = config.d_model, config.num_heads * config.d_kv
    feed_forward = d * config.d_ff * (3 if config.is_gated_act else 2)
    projection = d * inner  # of queries, keys, values or outputs
    encoder_layer = 4 * projection + feed_forward
    decoder_layer = 6 * projection + feed_forward  # q, k, v, o of itself; q, o of the other side
    encoder_layers, decoder_layers = config.num_layers, config.num_decoder_layers
    products = counts.encoder * (encoder_layers * encoder_layer + decoder_layers * 2 * projection)
    products += counts.decoder * (decoder_layers * decoder_layer + d * config.vocab_size)
    pairs = encoder_layers * counts.encoder_pairs + decoder_layers * (counts.decoder_pairs + counts.cross_pairs)
    return 3 * (2 * products + 4 * inner * pairs)


# Dense bf16 operations a second, from NVIDIA's data sheets (the SXM form where there are several); the first name that
# is part of the device's counts.
_PEAKS = {
    "B200": 2250e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Give what a device can do at most, dense in bf16; None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)
