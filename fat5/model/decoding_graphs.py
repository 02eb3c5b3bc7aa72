"""Steps of decoding as CUDA graphs: with a static cache, `generate` launches a whole step at once.

`torch.compile`, which does so for other models, takes seconds to compile a step, and at every token a third of a
millisecond to see that nothing has changed. Here that is looked for once a cache, and so once a call of `generate`.
"""

import gc
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import Seq2SeqLMOutput

from .decoding_inputs import (
    Facts,
    initialise,
    is_filled,
    is_small,
    layers_of,
    places_of,
    read_in_a_step,
    shapes_of,
    shapes_of_a_first_step,
    with_copies,
    writable_copies,
)
from .decoding_state import state_of
from .ops_graph import rehearsal

MOST_SHAPES = 16  # of first steps and of later ones
MOST_GRAPHS = 4  # of the same shapes: one for each cache that is used at a time
ALIGNMENT = 512  # bytes, as torch's allocator aligns

_lock = threading.Lock()  # of all models: a capture is disturbed by what others free or wait for


class DecodingGraphs:
    """The steps of a model that were captured last, as CUDA graphs.

    A step of new shapes runs as it is, by the kernels of a graph, which are compiled by that; the next one is captured.
    A graph serves only where the cache lies that it was captured with. So the cache is moved before to memory that is
    kept for that, and so are those of later calls of `generate`; while somebody holds the last, in new memory.
    """

    def __init__(self) -> None:
        self._state: Facts | None = None
        self._room: MutableMapping[EncoderDecoderCache, int] = weakref.WeakKeyDictionary()  # tokens that graphs may add
        self._expected: MutableMapping[EncoderDecoderCache, Facts] = weakref.WeakKeyDictionary()  # the model's states
        self._graphs: OrderedDict[Facts, OrderedDict[Facts, _CapturedStep]] = OrderedDict()  # by shapes, then places
        self._pool: Any = None  # of what graphs compute in between, one after the other
        self._stream: Any = None  # on which they are captured
        self._memory: tuple[Tensor, Tensor] | None = (
            None  # bytes of keys and values, and counts, of one cache at a time
        )

    def look_again(self) -> None:
        """Look whether the model has changed before the next step, even if its cache is not new."""
        with _lock:
            self._room.clear()

    def expect(self, cache: EncoderDecoderCache, state: Facts) -> None:
        """Take over a new cache whose steps are to be by graphs of a model in this state."""
        with _lock:
            self._expected[cache] = state

    def are_free_for(self, state: Facts) -> bool:
        """Whether no other stream uses them, in turns with which they would be captured again and again."""
        with _lock:
            is_in_use = bool(self._room or self._expected)
            return not is_in_use or self._state is None or self._state[-1] == state[-1]

    def step(self, model: nn.Module, otherwise: Callable[..., Any], **inputs: Any) -> Any:
        """The model's output for a step of `generate`; what cannot be captured is left to `otherwise`."""
        shapes = shapes_of(inputs)
        if shapes is None:
            return otherwise(**inputs)
        with _lock:
            output = self._step(model, inputs, shapes)
        return otherwise(**inputs) if output is None else output

    def first_step(self, model: nn.Module, **inputs: Any) -> Any:
        """The model's output for the step of `generate` that fills an empty cache."""
        shapes = shapes_of_a_first_step(inputs)
        if shapes is None:
            return model(**inputs)
        with _lock:
            output = self._step(model, inputs, shapes)
        return model(**inputs) if output is None else output

    def _step(self, model: nn.Module, inputs: dict[str, Any], shapes: Facts) -> Any:
        cache = inputs["past_key_values"]
        if cache not in self._room:
            self._begin(model, cache)
        if self._room[cache] == 0:  # a full cache is to say so itself
            return None
        self._room[cache] -= 1
        is_first = not is_filled(cache)
        if is_first and not initialise(cache, model, inputs):
            return None
        if shapes not in self._graphs:
            with rehearsal():
                output = model(**inputs)
            self._keep_for(shapes)
            return output
        self._graphs.move_to_end(shapes)
        places = tuple(places_of(cache))
        is_lasting = getattr(cache, "_is_user_defined", False)  # and so where its owner may know it to be
        if places not in self._graphs[shapes] and not is_lasting:
            is_moved = self._move(cache)
            if is_first and not is_moved:  # a graph would serve this once
                with rehearsal():
                    return model(**inputs)
            places = tuple(places_of(cache))
        if places not in self._graphs[shapes]:
            self._make_room(self._graphs[shapes], MOST_GRAPHS)
            try:
                captured = with_free_memory(lambda: self._capture(model, inputs))
            except torch.OutOfMemoryError:
                self._room[cache] = 0
                return None
            self._graphs.setdefault(shapes, OrderedDict())[places] = captured
        self._graphs[shapes].move_to_end(places)
        return self._graphs[shapes][places].replay(inputs)

    def _begin(self, model: nn.Module, cache: EncoderDecoderCache) -> None:
        """Look at the model and the cache. What was captured is forgotten if the model has changed since."""
        state = self._expected.pop(cache, None) or state_of(model)
        if state is None:  # for now: what was captured may serve again
            self._room[cache] = 0
            return
        if state != self._state:
            self._forget()
            self._room.clear()
        self._state = state
        own = layers_of(cache)[0]
        self._room[cache] = own.max_cache_len - int(own.cumulative_length)

    def _move(self, cache: EncoderDecoderCache) -> bool:
        """Have the cache lie in the memory that is kept, unless it is large; where another one lies, in new memory."""
        layers = layers_of(cache)
        tensors = {(layer, name): getattr(layer, name) for layer in layers for name in ("keys", "values")}
        sizes = [-(-x.nbytes // ALIGNMENT) * ALIGNMENT for x in tensors.values()]
        if not is_small(sum(sizes)) or not all(x.is_contiguous() for x in tensors.values()):
            return False
        if self._memory is not None and layers[0].keys.data_ptr() == self._memory[0].data_ptr():
            return True
        if not self._fits(sum(sizes), len(layers)):
            self._memory = None
            with suppress(torch.OutOfMemoryError), torch.inference_mode(False):
                device = next(iter(tensors.values())).device
                counts = torch.empty((len(layers), ALIGNMENT // 8), dtype=torch.int64, device=device)
                # as much as a longer one takes, so that it need not be captured anew for that
                self._memory = torch.empty(1 << (sum(sizes) - 1).bit_length(), dtype=torch.uint8, device=device), counts
        if self._memory is None:
            return False
        memory, counts = self._memory
        for ((layer, name), x), part in zip(tensors.items(), memory[: sum(sizes)].split(sizes), strict=True):
            setattr(layer, name, part[: x.nbytes].view(x.dtype).view(x.shape).copy_(x))
        for layer, count in zip(layers, counts[:, 0], strict=False):
            layer.cumulative_length = count.copy_(layer.cumulative_length)
        return True

    def _fits(self, size: int, layers: int) -> bool:
        """Whether a cache of so many bytes can lie in the memory that is kept, and no other one does."""
        if self._memory is None or any(map(is_shared, self._memory)):
            return False
        memory, counts = self._memory
        return memory.nbytes >= size and len(counts) >= layers

    def _keep_for(self, shapes: Facts) -> None:
        self._make_room(self._graphs, MOST_SHAPES)
        self._graphs[shapes] = OrderedDict()

    def _capture(self, model: nn.Module, inputs: dict[str, Any]) -> "_CapturedStep":
        if not any(self._graphs.values()):  # a pool ends with the last of its graphs
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        cache = inputs["past_key_values"]
        is_updated = dict(cache.is_updated)
        try:
            return _CapturedStep(model, inputs, self._pool, self._stream)
        except BaseException:
            cache.is_updated = is_updated  # as nothing was computed
            with suppress(RuntimeError):
                self._forget()  # the pool, too, may be left in the middle of a capture
            raise

    def _forget(self) -> None:
        self._make_room(self._graphs, 1)
        self._memory = None

    def _make_room(self, graphs: OrderedDict[Facts, Any], most: int) -> None:
        """Have one more fit in, those go that have not been used for longest."""
        if len(graphs) >= most:
            stream = self._state[-1] if self._state else None  # on which they may still run, of another thread perhaps
            (stream or torch.cuda.current_stream()).synchronize()
        while len(graphs) >= most:
            graphs.popitem(last=False)

    def __reduce__(self) -> Any:
        """A copy or pickle of the model begins with none, as graphs belong to the memory they were captured for."""
        return DecodingGraphs, ()


class _CapturedStep:
    """One graph, with the memory that it reads its inputs from."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any], pool: Any, stream: Any) -> None:
        self.inputs = writable_copies(read_in_a_step(inputs))
        given = with_copies(inputs, self.inputs)
        self.graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        # not by `torch.cuda.graph`, which first waits for the device and gives its free memory back
        with torch.cuda.stream(stream), own_workspaces(), no_garbage_collection():
            self.graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                self.logits = model(**given).logits
            except BaseException:
                with suppress(RuntimeError):  # which would hide the other
                    self.graph.capture_end()
                raise
            self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def replay(self, inputs: dict[str, Any]) -> Seq2SeqLMOutput:
        """The model's output, in memory of its own. What a step does to the cache is done to it."""
        for name, x in read_in_a_step(inputs).items():
            self.inputs[name].copy_(x)
        self.graph.replay()
        cache = inputs["past_key_values"]
        cache.is_updated = dict.fromkeys(cache.is_updated, True)
        return Seq2SeqLMOutput(
            logits=self.logits.clone(),
            past_key_values=cache,
            encoder_last_hidden_state=inputs["encoder_outputs"].last_hidden_state,
        )


@contextmanager
def own_workspaces() -> Iterator[None]:
    """Have cuBLAS allocate anew here, where it is from a graph's memory, and again afterwards."""
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """What is collected during a capture may be what may not go during one: memory pools, say."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def is_shared(x: Tensor) -> bool:
    """Whether another tensor lies in the memory of this one."""
    return holders(x) > holders(torch.empty(0))


def holders(x: Tensor) -> int:
    """How many hold the memory of a tensor, itself and this question among them."""
    return torch._C._storage_Use_Count(x.untyped_storage()._cdata)


def with_free_memory(work: Callable[[], Any]) -> Any:
    """What `work` returns, at the second try with what the allocator holds free, which a capture cannot reach."""
    try:
        return work()
    except torch.OutOfMemoryError:  # which holds what was allocated before it, as long as it is handled
        pass
    torch.cuda.empty_cache()
    return work()
