"""Steps of decoding as CUDA graphs: with a static cache, `generate` launches a whole step at once.

`torch.compile`, which does so for other models, takes seconds to compile a step, and at every token a third of a
millisecond to see that nothing has changed. Here that is looked for once a cache, and so once a call of `generate`.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache, StaticLayer
from transformers.modeling_outputs import Seq2SeqLMOutput

from .fused_linear import is_untouched
from .ops_graph import rehearsal

MOST_GRAPHS = 4
NAMES = {"decoder_input_ids", "encoder_outputs", "past_key_values", "use_cache", "return_dict"}
PLAIN_CODE = ("torch.nn.modules.", "transformers.activations")
"""Where the modules are from whose calls depend on nothing but their weights and input."""

Facts = tuple[Any, ...]


class DecodingGraphs:
    """The steps of a model that were captured last, as CUDA graphs.

    A step of new shapes runs as it is, by the kernels of a graph, which are compiled by that; the next one is captured.
    A graph serves wherever a cache lies where the first one lay, as those of later calls of `generate` mostly do.
    """

    def __init__(self) -> None:
        self._state: Facts | None = None
        self._graphs: OrderedDict[Facts, _CapturedStep] = OrderedDict()
        self._rehearsed: set[Facts] = set()
        self._cache: Callable[[], EncoderDecoderCache | None] = lambda: None

    def step(self, model: nn.Module, otherwise: Callable[..., Any], **inputs: Any) -> Any:
        """The model's output for a step of `generate`; what cannot be captured is left to `otherwise`."""
        shapes = shapes_of(inputs)
        if shapes is None or not self._may_serve(model, inputs["past_key_values"]):
            return otherwise(**inputs)
        places = shapes, *places_of(inputs["past_key_values"])
        if places not in self._graphs:
            if shapes not in self._rehearsed:
                self._rehearsed.add(shapes)
                with rehearsal():
                    return model(**inputs)
            if len(self._graphs) == MOST_GRAPHS:
                torch.cuda.current_stream().synchronize()  # the oldest may still run
                self._graphs.popitem(last=False)
            self._graphs[places] = _CapturedStep(model, inputs)
        self._graphs.move_to_end(places)
        return self._graphs[places].replay(inputs)

    def _may_serve(self, model: nn.Module, cache: EncoderDecoderCache) -> bool:
        """Whether the model's steps can be captured. What was captured is forgotten when the model has changed since.

        This is looked for when a cache is new.
        """
        if self._cache() is not cache:
            state = state_of(model)
            if state != self._state:
                self._graphs.clear()
                self._rehearsed.clear()
            self._state, self._cache = state, weakref.ref(cache)
        return self._state is not None

    def __reduce__(self) -> Any:
        """A copy or pickle of the model begins with none, as graphs belong to the memory they were captured for."""
        return DecodingGraphs, ()


class _CapturedStep:
    """One graph, with the memory that it reads its inputs from."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        self.inputs = writable_copies(read_in_a_step(inputs))
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # not by `torch.cuda.graph`, which first waits for the device and gives its free memory back
        with torch.cuda.stream(stream):
            self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.logits = model(**{**inputs, **self.inputs}).logits
            finally:
                self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def replay(self, inputs: dict[str, Any]) -> Seq2SeqLMOutput:
        for name, x in read_in_a_step(inputs).items():
            self.inputs[name].copy_(x)
        self.graph.replay()
        return Seq2SeqLMOutput(
            logits=self.logits.clone(),
            past_key_values=inputs["past_key_values"],
            encoder_last_hidden_state=inputs["encoder_outputs"].last_hidden_state,
        )


def read_in_a_step(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among the inputs that a step reads: not the encoder's states, whose keys and values are cached."""
    return {name: inputs[name] for name in ("decoder_input_ids", "attention_mask") if inputs.get(name) is not None}


def writable_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies to write to in and out of inference mode."""
    with torch.inference_mode(False):
        return {name: x.clone() for name, x in tensors.items()}


def shapes_of(inputs: dict[str, Any]) -> Facts | None:
    """What a graph depends on beside the model and where the cache lies.

    None for anything but a plain step without gradients: one token a row, and a static cache that holds some already.
    """
    if torch.is_grad_enabled() or inputs.keys() - {"attention_mask"} != NAMES:
        return None
    ids, cache = inputs["decoder_input_ids"], inputs["past_key_values"]
    encoded = getattr(inputs["encoder_outputs"], "last_hidden_state", None)
    if encoded is None or not (inputs["use_cache"] and inputs["return_dict"]):
        return None
    if type(cache) is not EncoderDecoderCache or ids.shape[1] != 1 or not all(cache.is_updated.values()):
        return None
    layers = layers_of(cache)
    if not layers or not all(type(layer) is StaticLayer and layer.is_initialized for layer in layers):
        return None
    if not hasattr(layers[0], "cumulative_length"):  # in transformers 4
        return None
    tensors = *read_in_a_step(inputs).values(), encoded, layers[0].keys, layers[-1].keys
    return tuple((x.shape, x.dtype, x.device) for x in tensors)


def layers_of(cache: EncoderDecoderCache) -> list[Any]:
    """The decoder's own, then those of what it reads."""
    return [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]


def places_of(cache: EncoderDecoderCache) -> Iterator[int]:
    """Where the tensors of a cache lie."""
    for layer in layers_of(cache):
        yield layer.keys.data_ptr()
        yield layer.values.data_ptr()
        yield layer.cumulative_length.data_ptr()


def state_of(model: nn.Module) -> Facts | None:
    """What a graph takes for given of a model: its modules, where its weights lie, its configuration, torch's settings.

    None where a step cannot be captured, or may do more than the model's own code says: on devices without graphs, in
    training, under autocast, with another attention, with positions other than T5's (some keep tensors that a graph
    does not), with hooks, adapters, quantised or offloaded weights.
    """
    config: Any = model.config
    device = next(model.parameters()).device
    if not has_graphs(device) or torch.is_autocast_enabled(device.type):
        return None
    if config._attn_implementation != "fat5" or config.position_encoding_type not in ("t5", "none"):
        return None
    if config.output_hidden_states:
        return None
    own_code = __name__.rpartition(".")[0] + "."
    modules = list(modules_of_a_step(model))
    for module in modules:
        kind = type(module)
        if not f"{kind.__module__}.".startswith((own_code, *PLAIN_CODE)):
            return None
        in_training = module.training and kind not in (nn.Linear, nn.Embedding)  # to which it makes no difference
        if in_training or not is_untouched(module, kind):
            return None
    weights = [x for module in modules for x in (*module._parameters.values(), *module._buffers.values())]
    if any(type(x) not in (nn.Parameter, Tensor) or x.device != device for x in weights if x is not None):
        return None
    places = [x if x is None else (x.data_ptr(), x.dtype, x.shape, x.stride()) for x in weights]
    settings = torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.fp32_precision
    return list(map(id, modules)), places, config.to_dict(), settings


def modules_of_a_step(model: nn.Module) -> Iterator[nn.Module]:
    """The model and what it holds, but for the encoder; in a third of the time of `model.modules()`."""
    left = [model]
    while left:
        module = left.pop()
        yield module
        left.extend(
            x for name, x in module._modules.items() if x is not None and not (module is model and name == "encoder")
        )


def has_graphs(device: torch.device) -> bool:
    """Whether it is a GPU, and that on which this thread works."""
    return device.type == "cuda" and device.index == torch.cuda.current_device()
