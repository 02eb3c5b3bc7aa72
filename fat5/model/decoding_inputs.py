"""What a step of decoding reads, its inputs and its cache, as far as a graph of it depends on them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache, StaticCache, StaticLayer
from transformers.modeling_outputs import BaseModelOutput

from .ops_operator import is_watched

MOST_BYTES = 1 << 29  # of a cache that is moved; steps with larger ones take so long that a capture matters little
NAMES = {"decoder_input_ids", "encoder_outputs", "past_key_values", "use_cache", "return_dict"}
STATIC_CACHES_COUNT = hasattr(StaticLayer(max_cache_len=1), "cumulative_length")
"""Whether they count their tokens on the device, as in transformers 5, and not in Python."""

Facts = tuple[Any, ...]


def read_in_a_step(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among the inputs that a step reads: the encoder's states only as long as no keys and values of them
    are cached.
    """
    read = {name: inputs[name] for name in ("decoder_input_ids", "attention_mask") if inputs.get(name) is not None}
    if not is_filled(inputs["past_key_values"]):
        read["encoder_outputs"] = inputs["encoder_outputs"].last_hidden_state
    return read


def with_copies(inputs: dict[str, Any], copies: dict[str, Tensor]) -> dict[str, Any]:
    """A step's inputs, with copies of what it reads."""
    given = inputs | copies
    if "encoder_outputs" in copies:
        given["encoder_outputs"] = BaseModelOutput(last_hidden_state=copies["encoder_outputs"])
    return given


def writable_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies to write to in and out of inference mode, which would also switch gradients on."""
    with torch.inference_mode(False):
        return {name: x.detach().clone() for name, x in tensors.items()}


def shapes_of(inputs: dict[str, Any]) -> Facts | None:
    """What a graph depends on beside the model and where the cache lies.

    None for anything but a plain step without gradients: one token a row, and a static cache that holds some already.
    """
    if not is_plain_step(inputs) or not is_filled(inputs["past_key_values"]):
        return None
    layers = layers_of(inputs["past_key_values"])
    return facts_of(*read_in_a_step(inputs).values(), encoded_of(inputs), layers[0].keys, layers[-1].keys)


def shapes_of_a_first_step(inputs: dict[str, Any]) -> Facts | None:
    """The same of a step that makes keys and values of the encoder's states."""
    if not is_plain_step(inputs):
        return None
    cache = inputs["past_key_values"]
    layers = layers_of(cache)
    if any(cache.is_updated.values()) or any(layer.is_initialized for layer in layers):
        return None
    if getattr(cache, "_is_user_defined", False):
        return None
    facts = facts_of(*read_in_a_step(inputs).values())
    return facts and ("first", *facts, *(layer.max_cache_len for layer in layers))


def facts_of(*tensors: Tensor) -> Facts | None:
    """What a graph depends on of the tensors that it reads, if they are on one device."""
    if any(x.device != tensors[0].device for x in tensors):
        return None
    return tuple((x.shape, x.stride(), x.dtype, x.device) for x in tensors)


def is_plain_step(inputs: dict[str, Any]) -> bool:
    """Whether `generate` asks for one token a row, without gradients, and all that matters is known to a graph."""
    if torch.is_grad_enabled() or is_watched() or inputs.keys() - {"attention_mask"} != NAMES:
        return False
    if inputs["decoder_input_ids"].shape[1] != 1 or not (inputs["use_cache"] and inputs["return_dict"]):
        return False
    cache = inputs["past_key_values"]
    if encoded_of(inputs) is None or type(cache) is not EncoderDecoderCache:
        return False
    return is_plain_cache(cache.self_attention_cache) and is_plain_cache(cache.cross_attention_cache)


def encoded_of(inputs: dict[str, Any]) -> Any:
    """The encoder's states."""
    return getattr(inputs["encoder_outputs"], "last_hidden_state", None)


def is_filled(cache: EncoderDecoderCache) -> bool:
    """Whether it holds keys and values of the encoder."""
    return all(cache.is_updated.values()) and all(layer.is_initialized for layer in layers_of(cache))


def initialise(cache: EncoderDecoderCache, model: Any, inputs: dict[str, Any]) -> bool:
    """Allocate an empty cache, as its first tokens would, for a graph to find it so.

    Not, and False, where it would be too large to be moved, or its layers are of several dtypes.
    """
    ids, config = inputs["decoder_input_ids"], model.config
    dtype, *others = {x.dtype for x in weights_of_cached(model)}
    numbers = 2 * len(ids) * config.num_heads * config.d_kv * sum(layer.max_cache_len for layer in layers_of(cache))
    if others or not is_small(numbers * dtype.itemsize):
        return False
    for part in (cache.self_attention_cache, cache.cross_attention_cache):
        part.early_initialization(len(ids), config.num_heads, config.d_kv, dtype, ids.device)
    return True


def weights_of_cached(model: Any) -> Iterator[Tensor]:
    """Of the layers that make keys and values."""
    for block in model.decoder.block:
        for attention in (block.self_attention_layer.self_attention, block.cross_attention_layer.cross_attention):
            yield attention.Wk.weight
            yield attention.Wv.weight


def is_plain_cache(cache: Any) -> bool:
    """Whether a cache is static, no more than that, and counts its tokens, as in transformers 5."""
    if type(cache) is not StaticCache or cache.offloading:
        return False
    return STATIC_CACHES_COUNT and all(type(layer) is StaticLayer for layer in cache.layers)


def layers_of(cache: EncoderDecoderCache) -> list[Any]:
    """The decoder's own, then those of what it reads."""
    return [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]


def places_of(cache: EncoderDecoderCache) -> Iterator[int]:
    """Where the tensors of a cache lie that a step reads or writes."""
    for layer in layers_of(cache):
        yield layer.keys.data_ptr()
        yield layer.values.data_ptr()
        yield layer.cumulative_length.data_ptr()


def is_small(size: int) -> bool:
    """Whether a cache of so many bytes may be kept, or allocated before it is needed."""
    return size <= MOST_BYTES
