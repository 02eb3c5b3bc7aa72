"""Make a T5 safe for float16 by multiplying weights with powers of two: exact, and cancelled within the model.

T5's residual stream and its feed-forward layers exceed 65504 in larger models. The stream shrinks by 2**-k when the
embedding and all that is added to it (every `o` and `wo`) do; the norms cancel that, their epsilon shrinking by
2**-2k. The inner values of a feed-forward layer shrink by 2**-j when `wi_1`, or relu's `wi`, does, and `wo` takes 2**j
back. A tied head is 2**-k too small with its embedding: the decoder's last norm makes up for it, so that in a tied
model the decoder's last hidden states are 2**k larger, and nothing else changes. Nothing is ever clamped.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fat5convert.errors import ConvertError
from fat5convert.layout import Layout
from fat5convert.probe import make_probe, run_probe
from fat5convert.recognise import Recognised
from fat5convert.source import Checkpoint
from fat5convert.stock_models import Weights, streamed_stock

_LARGEST = torch.finfo(torch.float16).max
# Other inputs than the probe may go further: what can be rescaled keeps this much below the largest fp16 value.
_HEADROOM = 8

# Modules whose outputs no exponent makes smaller.
_NOT_RESCALED = ("q", "k", "v", "wi_0", "layer_norm", "final_layer_norm")
_HEADS = ("lm_head", "dense", "out_proj", "classifier", "qa_outputs")
_FEED_FORWARD = re.compile(r"(.*)\.DenseReluDense\.(wi|wi_0|wi_1|wo)\.weight")


@dataclass(frozen=True)
class Rescaling:
    """The exponents: `residual` is k, `inner` maps a feed-forward layer's T5 name to its j; zero is none."""

    residual: int = 0
    inner: Mapping[str, int] = field(default_factory=dict)

    def exponent(self, t5: str, layout: Layout) -> int:
        """The power of two that the tensor of this T5 name is multiplied with."""
        found = _FEED_FORWARD.fullmatch(t5)
        if found:
            j = self.inner.get(found[1], 0)
            return {"wi_0": 0, "wi": -j, "wi_1": -j, "wo": j - self.residual}[found[2]]
        if t5 == f"{layout.stock_prefix}shared.weight" or t5.endswith("Attention.o.weight"):
            return -self.residual
        tied = layout.tied and layout.is_language_model
        return self.residual if tied and t5 == "decoder.final_layer_norm.weight" else 0

    def adapt(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config of the rescaled model."""
        return {**config, "layer_norm_epsilon": config["layer_norm_epsilon"] * 2.0 ** (-2 * self.residual)}

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return {"residual": self.residual, "inner": dict(self.inner)}

    @classmethod
    def from_dict(cls, fields: Any) -> Rescaling:
        """Read back what `as_dict` gave; anything else is no rescaling."""
        if not isinstance(fields, dict) or not _is_exponent(fields.get("residual")):
            return cls()
        inner = fields.get("inner")
        entries = inner.items() if isinstance(inner, dict) else ()
        return cls(fields["residual"], {name: j for name, j in entries if _is_exponent(j)})


def choose_rescaling(checkpoint: Checkpoint, recognised: Recognised) -> Rescaling:
    """Run the stock model in fp32 on the probe, and choose the exponents by the largest values that occur.

    Raises:
        ConvertError: something is too large for float16 that no exact rescaling reaches.
    """
    largest = _measure(checkpoint, recognised)
    stream = max(largest["residual"].values())
    inner = {}
    for name, value in largest["inner"].items():
        j = _exponent(value)
        if j and not recognised.layout.gated and recognised.config["feed_forward_proj"] != "relu":
            raise ConvertError(
                f"{checkpoint.folder}: float16 cannot hold the values in {name} (up to {value:.3g} on the probe), and "
                f"its activation {recognised.config['feed_forward_proj']} cannot be rescaled exactly. Use bfloat16."
            )
        if j:
            inner[name] = j
    rescaling = Rescaling(_exponent(stream), inner)
    for name, found in largest["fixed"].items():
        value = found * 2.0 ** rescaling.exponent(f"{name}.weight", recognised.layout)  # a tied decoder's last norm
        if not value <= _LARGEST:
            raise ConvertError(
                f"{checkpoint.folder}: float16 cannot hold the values of {name} (up to {value:.3g} on the probe), "
                "which no rescaling reaches. Use bfloat16."
            )
    return rescaling


def _is_exponent(value: Any) -> bool:
    return type(value) is int and 0 <= value < 128  # fp32 has none larger


def _exponent(value: float) -> int:
    if not math.isfinite(value):
        raise ConvertError("the model computes values that are not finite on the probe; float16 cannot hold them")
    return max(0, math.ceil(math.log2(value * _HEADROOM / _LARGEST))) if value else 0


def _measure(checkpoint: Checkpoint, recognised: Recognised) -> dict[str, dict[str, float]]:
    """Largest absolute values: of the residual stream, inside each feed-forward layer, and of what is not rescaled."""
    model = streamed_stock(recognised, Weights(checkpoint, recognised))
    largest: dict[str, dict[str, float]] = {kind: defaultdict(float) for kind in ("residual", "inner", "fixed")}
    queries: dict[str, torch.Tensor] = {}

    def note(kind: str, name: str, values: torch.Tensor) -> None:
        # `max` would drop NaN, which must be seen.
        value = float(values.abs().max())
        largest[kind][name] = value if math.isnan(value) else max(largest[kind][name], value)

    def watch(kind: str, name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            note(kind, name, output[0] if isinstance(output, tuple) else output)

        return hook

    def scores(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
            batch, heads = output.shape[0], recognised.layout.num_heads
            q, k = (t.view(batch, -1, heads, recognised.layout.d_kv).transpose(1, 2) for t in (queries[name], output))
            note("fixed", f"{name} (scores)", q @ k.transpose(2, 3))

        return hook

    def remember(name: str) -> Callable[..., None]:
        return lambda module, args, output: queries.__setitem__(name, output)

    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        if re.search(r"\.layer\.\d+$", name) or last in ("o", "embed_tokens", "shared"):
            module.register_forward_hook(watch("residual", name))
        elif last == "wo":
            feed_forward = parent.removesuffix(".DenseReluDense")
            module.register_forward_pre_hook(lambda module, args, name=feed_forward: note("inner", name, args[0]))
            module.register_forward_hook(watch("residual", name))
        elif last in ("wi", "wi_1"):
            module.register_forward_hook(watch("inner", parent.removesuffix(".DenseReluDense")))
        elif last in _NOT_RESCALED + _HEADS:
            module.register_forward_hook(watch("fixed", name))
        if last == "q":
            module.register_forward_hook(remember(parent))
        elif last == "k":
            module.register_forward_hook(scores(parent))
    run_probe(model, make_probe(recognised.config, recognised.layout), recognised.layout)
    return largest
