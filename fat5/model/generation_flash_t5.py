"""What `generate` of `transformers` asks of FlashT5: the inputs, the caches and the calls of its steps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from transformers import (
    CompileConfig,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticCache

from .decoding_graphs import DecodingGraphs
from .decoding_inputs import STATIC_CACHES_COUNT, encoded_of, is_plain_cache, is_small
from .decoding_state import may_serve, state_of
from .encoder_decoder_flash_t5 import FlashT5EncoderDecoder
from .ops_operator import is_watched
from .stack_flash_t5 import static_length

FEW_TOKENS = 4  # the first and, of new shapes, the second are not by a graph, and to capture one takes as long as two


class FlashT5Generative(FlashT5EncoderDecoder, GenerationMixin):
    """Encoder and decoder that `generate` can call, once they have a head."""

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[GenerationConfig, dict[str, Any]]:
        """As in `transformers`, but without `prefill_chunk_size`: the decoder's prompt is read in one call.

        Reading it in chunks, `transformers` would cut the encoder's mask to the length of each as well.
        """
        prepare: Any = GenerationMixin._prepare_generation_config  # its `self` is annotated with a protocol
        config, model_kwargs = prepare(self, *args, **kwargs)
        config.prefill_chunk_size = None
        return config, model_kwargs

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Inputs of one step of `generate`.

        Raises:
            ValueError: if there are segment ids, since packed rows cannot be continued.
        """
        packed = ("encoder_segment_ids", "decoder_segment_ids", "encoder_cu_seqlens", "decoder_cu_seqlens")
        if any(kwargs.get(name) is not None for name in packed):
            raise ValueError("`generate` continues one sequence per row: give it unpacked inputs, without segments.")
        if len(args) == 1 and kwargs.get("next_sequence_length") is not None and self._is_plain_step(args[0], kwargs):
            # as below, without what must be asked for other models, which takes as long as a layer of the decoder
            length = kwargs.pop("next_sequence_length")
            return {"decoder_input_ids": args[0][:, -length:].clone(memory_format=torch.contiguous_format), **kwargs}
        prepare: Any = GenerationMixin.prepare_inputs_for_generation  # its `self` is annotated with a protocol
        inputs = prepare(self, *args, **kwargs)
        inputs.pop("cache_position", None)  # transformers 4 passes it; the cache knows
        return inputs

    def _is_plain_step(self, input_ids: torch.Tensor, given: dict[str, Any]) -> bool:
        """Whether `generate` asks for nothing special in a step, and all that it works on lies where the model does."""
        names = {"next_sequence_length", "past_key_values", "encoder_outputs", "use_cache"}
        if given.keys() - {"attention_mask"} != names or given["encoder_outputs"] is None:
            return False
        device, tensors = self.device, (input_ids, given["encoder_outputs"][0], given.get("attention_mask"))
        return all(x is None or x.device == device for x in tensors)

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable[..., Any]:
        """What `generate` calls for each token once it has a static cache: see `DecodingGraphs`.

        A configuration that asks for something special of `torch.compile` gets that.
        """
        compiled = super().get_compiled_call
        if not (may_serve(self) and asks_for_nothing_special(compile_config)):
            return compiled(compile_config)
        return self._step_by_graphs(lambda **inputs: compiled(compile_config)(**inputs))

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy search and sampling, whose steps are by graphs where nobody asked for a kind of cache."""
        model: Any = self
        if not synced_gpus and self._choose_cache(input_ids, generation_config, stopping_criteria, model_kwargs):
            model = _SteppedModel(self, self._step_by_graphs(model))
        search: Any = GenerationMixin._sample
        return search(
            model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer,
            **model_kwargs,
        )  # fmt: skip

    def _prefill(
        self,
        input_ids: torch.Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """The step that fills the cache, by a graph if the cache is static."""
        model: Any = self
        if self._may_step_by_graphs(generation_config, model_kwargs):
            model = _SteppedModel(self, partial(self._graphs.first_step, model))
        prefill: Any = GenerationMixin._prefill
        return prefill(model, input_ids, generation_config, model_kwargs, is_first_iteration)

    def _beam_search(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """Beam search, which in `transformers` compiles nothing: here graphs serve its steps with a static cache too.

        Not where compiling is forbidden or somebody else reorders the cache, which then may lie elsewhere at each step.
        """
        model: Any = self
        if self._reorders_in_place():
            if not synced_gpus:
                self._choose_cache(input_ids, generation_config, stopping_criteria, model_kwargs)
            if self._may_step_by_graphs(generation_config, model_kwargs):
                model = _SteppedModel(self, self._step_by_graphs(model))
        search: Any = GenerationMixin._beam_search
        return search(
            model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, **model_kwargs
        )

    def _choose_cache(
        self,
        input_ids: torch.Tensor,
        asked: GenerationConfig,
        stopping_criteria: StoppingCriteriaList,
        given: dict[str, Any],
    ) -> bool:
        """Whether nobody asked for a kind of cache and graphs can serve the steps: `given` gets a static one then.

        Not where somebody may look at the cache, nor for so many tokens that to allocate them beforehand may matter.
        """
        if not (STATIC_CACHES_COUNT and may_serve(self)) or is_watched() or not is_open_choice(asked, given):
            return False
        rows, begun = input_ids.shape
        longest = stopping_criteria.max_length
        if longest is None or longest - begun < FEW_TOKENS:
            return False
        width = self.config.num_heads * self.config.d_kv
        if not is_small(2 * rows * longest * self.config.num_decoder_layers * width * self.dtype.itemsize):
            return False
        state = state_of(self)
        if state is None or not self._graphs.are_free_for(state):
            return False
        config = self.config.get_text_config(decoder=True)
        lengths = longest - 1, encoded_of(given).shape[1]  # the last token is read by no step
        given["past_key_values"] = EncoderDecoderCache(*(StaticCache(config=config, max_cache_len=n) for n in lengths))
        self._graphs.expect(given["past_key_values"], state)
        return True

    def _step_by_graphs(self, otherwise: Callable[..., Any]) -> Callable[..., Any]:
        model: Any = self
        self._graphs.look_again()
        return partial(self._graphs.step, model, otherwise)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module, which moves or converts it: graphs, and the memory they keep, are of no use then."""
        vars(self).pop("_decoding_graphs", None)
        return super()._apply(*args, **kwargs)

    @property
    def _graphs(self) -> DecodingGraphs:
        graphs: DecodingGraphs = vars(self).setdefault("_decoding_graphs", DecodingGraphs())
        return graphs

    def _may_step_by_graphs(self, asked: GenerationConfig, given: dict[str, Any]) -> bool:
        if not may_serve(self) or asked.disable_compile or not asks_for_nothing_special(asked.compile_config):
            return False
        return getattr(given.get("past_key_values"), "is_compileable", False)

    def _reorders_in_place(self) -> bool:
        return self._reorder_cache is FlashT5Generative._reorder_cache

    @staticmethod
    def _reorder_cache(past_key_values: EncoderDecoderCache, beam_idx: torch.LongTensor) -> EncoderDecoderCache:
        """Let each beam go on from what another one has decoded. `beam_idx`: int64 `[B * beams]`, within each example.

        The keys and values of the encoder stay: the beams of an example all have the same. A static cache stays in its
        place, too, where a graph has been told to find it.
        """
        cache: Any = past_key_values.self_attention_cache
        in_place = not torch.is_grad_enabled() and is_plain_cache(cache)
        if not in_place or len(beam_idx) != len(cache.layers[0].keys):
            cache.reorder_cache(beam_idx)
            return past_key_values
        for layer in cache.layers:
            for x in (layer.keys, layer.values):
                x.copy_(x.index_select(0, beam_idx.to(x.device)))
        return past_key_values

    @staticmethod
    def create_masks_for_generate(
        attention_mask: torch.Tensor | None, past_key_values: Cache, **_: Any
    ) -> torch.Tensor | None:
        """Mask for a step with a static cache: as long as the cache, whose later part causality hides anyway.

        `generate` calls this where it would build a 4-d mask, for which FlashT5 would leave its kernels.
        """
        if attention_mask is None:
            return None
        cache = past_key_values
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        return F.pad(attention_mask, (0, static_length(cache) - attention_mask.shape[1]), value=1)


def is_open_choice(asked: GenerationConfig, given: dict[str, Any]) -> bool:
    """Whether `generate` would take an empty cache that grows, as nobody asked for any, and return none."""
    cache = given.get("past_key_values")
    if given.keys() - {"attention_mask"} != {"encoder_outputs", "past_key_values", "use_cache"}:
        return False
    if type(cache) is not EncoderDecoderCache or getattr(cache, "_is_user_defined", False):
        return False
    if any(type(part) is not DynamicCache for part in (cache.self_attention_cache, cache.cross_attention_cache)):
        return False
    if asked.cache_implementation is not None or asked.return_dict_in_generate or asked.is_assistant:
        return False
    if asked.disable_compile or not asks_for_nothing_special(asked.compile_config):
        return False
    return encoded_of(given) is not None and cache.get_seq_length() == 0


def asks_for_nothing_special(compile_config: CompileConfig | None) -> bool:
    """Whether graphs may do what `torch.compile` would be asked for."""
    return compile_config in (None, CompileConfig())


class _SteppedModel:
    """A model as a search sees it that is to call its steps otherwise, and not to compile; all else is the model's."""

    def __init__(self, model: Any, step: Callable[..., Any]) -> None:
        self._model, self._step = model, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        return self._step(**inputs)

    def _valid_auto_compile_criteria(self, *_: Any) -> bool:
        return False
