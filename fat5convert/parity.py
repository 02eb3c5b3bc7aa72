"""Run stock `transformers` and the converted model on the same fixed probes, and compare what they compute.

Both run in fp32 on the CPU. The oracle is stock T5, eager; for the published FAT5 with other positions than T5's, with
its bias replaced (`published_bias`). For umT5 it is stock's decoder states under an unscaled
head: transformers 5 multiplies umT5's decoder output by d_model**-0.5, which the model was not trained with.
For a lossy dtype the oracle's weights are rounded first: what then remains is the conversion's own error, held to
the same bounds; what the rounding itself does is measured and stated beside it, and what the converted model computes
when run in its own dtype.

Small models are loaded whole, as a user loads them, and generate. Large ones are streamed layer by layer, and their
most likely next tokens are compared instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from fat5 import model as fat5_model
from fat5.model import FlashT5Config
from fat5convert.errors import ConvertError, some
from fat5convert.precision import CONVERTIBLE, Form, kept_dtype, short_name
from fat5convert.probe import DECODER_LENGTHS, ENCODER_LENGTHS, Outputs, Probe, make_probe, run_probe
from fat5convert.recognise import Recognised
from fat5convert.source import Checkpoint, local
from fat5convert.stock_models import Weights, class_name, stock_class, streamed_stock
from fat5convert.streaming import streamed

# Largest error relative to the largest value compared with.
BOUNDS = {"eager": 1e-5, "sdpa": 1e-4}
QUANTILES = (50.0, 90.0, 99.0, 99.9, 99.99)
# Up to this many weights both models are loaded whole, in fp32.
WHOLE_PARAMETERS = 100_000_000
_NEW_TOKENS = 16


def compare_models(
    folder: Path, checkpoint: Checkpoint, recognised: Recognised, forms: Mapping[str, Form]
) -> tuple[dict[str, Any], list[str]]:
    """Compare the FAT5 model in `folder` with stock `transformers` on the source checkpoint.

    Args:
        folder: OUT, or what will be.
        checkpoint: the source.
        recognised: which tensor is which.
        forms: what became of each tensor, by FAT5 name.

    Returns:
        The figures for `parity.json`, and the differences found in words (none: they agree).
    """
    return _Comparison(folder, checkpoint, recognised, forms).run()


class _Comparison:
    def __init__(self, folder: Path, checkpoint: Checkpoint, recognised: Recognised, forms: Mapping[str, Form]) -> None:
        self.folder, self.checkpoint, self.recognised, self.forms = folder, checkpoint, recognised, forms
        self.layout = recognised.layout
        parameters = sum(torch.Size(pair.shape).numel() for pair in recognised.pairs)
        self.whole = parameters <= WHOLE_PARAMETERS
        self.probe: Probe = make_probe(recognised.config, self.layout)
        self.differences: list[str] = []
        config = recognised.config
        self.generation = GenerationConfig(
            max_new_tokens=_NEW_TOKENS,
            do_sample=False,
            decoder_start_token_id=config["decoder_start_token_id"] or 0,
            eos_token_id=config["eos_token_id"],
            pad_token_id=config["pad_token_id"],
        )

    def run(self) -> tuple[dict[str, Any], list[str]]:
        with _quiet():
            exact, exact_tokens = self._outputs(self._stock(None), oracle=True)
            oracle, tokens, rounding = exact, exact_tokens, None
            if self._is_lossy():
                oracle, tokens = self._outputs(self._stock(self.forms), oracle=True)
                rounding = _errors(oracle, exact) | {
                    "greedy_identical": self._same_tokens(tokens, exact_tokens, exact, 0.0),
                    "quantiles": _quantiles(oracle, exact),
                }
            results = []
            for implementation, bound in BOUNDS.items():
                ours, our_tokens = self._outputs(self._ours(implementation, torch.float32))
                results.append(self._compare(implementation, bound, ours, our_tokens, oracle, tokens))
            in_dtype = self._in_own_dtype(exact) if rounding else None
        probes = {"encoder_lengths": list(ENCODER_LENGTHS), "decoder_lengths": list(DECODER_LENGTHS)}
        figures = {
            "method": "whole" if self.whole else "layer-streamed",
            "compared": self._compared(),
            "probes": probes,
            "implementations": results,
            "rounding": rounding,
            "in_own_dtype": in_dtype,
        }
        return figures, self.differences

    def _compared(self) -> str:
        if self.layout.head:
            return f"logits of {self.layout.head.title}"
        return "encoder states" if self.layout.encoder_only else "logits"

    def _stock(self, forms: Mapping[str, Form] | None) -> Any:
        """The oracle, in fp32; with forms, its weights are the values that those stand for."""
        weights = Weights(self.checkpoint, self.recognised, forms)
        dtypes = {self.checkpoint.tensors[pair.source].dtype for pair in self.recognised.pairs}
        naming = self.recognised.naming
        stock_names = naming.column == "t5" and naming.prefix == self.layout.stock_prefix
        readable = stock_names and self.checkpoint.location.file is None
        if not (self.whole and readable and dtypes <= {dtype for dtype in CONVERTIBLE if kept_dtype(dtype) == dtype}):
            return streamed_stock(self.recognised, weights)
        stock = _load_stock(self.checkpoint, self.recognised)
        stored = Weights(self.checkpoint, self.recognised)
        broken = [name for name, parameter in stock.named_parameters() if not parameter.isfinite().all()]
        if broken:
            self.differences.append(f"values that are not finite, so that nothing can be compared, in {some(broken)}")
        elif not self.recognised.layout.tied and not torch.equal(stock.lm_head.weight, stored["lm_head.weight"]):
            self.differences.append("stock transformers did not load the lm_head of the file, and is no oracle for it")
        if forms is not None:
            with torch.no_grad():
                for name, parameter in stock.named_parameters():
                    parameter.copy_(weights[name])
        return stock

    def _ours(self, implementation: str, dtype: torch.dtype) -> Any:
        model_class: type[PreTrainedModel] = getattr(fat5_model, class_name("flash_t5", self.layout))
        if self.whole:
            return model_class.from_pretrained(self.folder, dtype=dtype, attn_implementation=implementation).eval()
        config = FlashT5Config.from_pretrained(self.folder)
        return streamed(model_class, config, _OwnWeights(Checkpoint(local(self.folder))), implementation, dtype)

    def _outputs(self, model: Any, oracle: bool = False) -> tuple[Outputs, torch.Tensor | None]:
        unscaled = oracle and self.recognised.model_type == "umt5"
        outputs = run_probe(model, self.probe, self.layout, unscaled=unscaled, own_loss=self.whole)
        if outputs.logits is None or not self.layout.is_language_model:
            return outputs, None
        if not self.whole:
            return outputs, outputs.logits.argmax(-1)
        model.generation_config = self.generation  # whose every setting else comes from the checkpoint
        tokens = model.generate(
            input_ids=self.probe.input_ids,
            attention_mask=self.probe.attention_mask,
            generation_config=self.generation,
        )
        return outputs, tokens

    def _compare(
        self,
        implementation: str,
        bound: float,
        ours: Outputs,
        our_tokens: torch.Tensor | None,
        oracle: Outputs,
        tokens: torch.Tensor | None,
    ) -> dict[str, Any]:
        errors = _errors(ours, oracle)
        # Written so that NaN is a problem too.
        problems = [f"{name} {error:.2e} above {bound:.0e}" for name, error in errors.items() if not error <= bound]
        result: dict[str, Any] = {"attn_implementation": implementation, "bound": bound, **errors}
        if oracle.logits is not None:
            result["largest_logit"] = float(oracle.logits.abs().max())
        if oracle.loss is not None:
            identical = self._same_tokens(our_tokens, tokens, oracle, bound)
            if not identical:
                problems.append("greedy tokens differ")
            result |= {
                "loss": ours.loss,
                "oracle_loss": oracle.loss,
                "greedy_identical": identical,
            }
        self.differences += [f"{implementation}: {problem}" for problem in problems]
        return result

    def _same_tokens(
        self, ours: torch.Tensor | None, theirs: torch.Tensor | None, oracle: Outputs, bound: float
    ) -> bool:
        if ours is None or theirs is None or oracle.logits is None:
            return True
        if self.whole:
            return torch.equal(ours, theirs)
        # One choice per position: where the oracle's best two are as close as the bound lets logits move, either is.
        best = oracle.logits.topk(2, dim=-1).values
        close = best[:, 0] - best[:, 1] <= 2 * bound * oracle.logits.abs().max()
        return bool(((ours == theirs) | close).all())

    def _is_lossy(self) -> bool:
        for pair in self.recognised.pairs:
            form, dtype = self.forms[pair.fat5], self.checkpoint.tensors[pair.source].dtype
            if form == Form(dtype):
                continue
            if any(
                not torch.equal(form.undo(form.apply(chunk)), chunk.float())
                for chunk in self.checkpoint.chunks(pair.source)
            ):
                return True
        return False

    def _in_own_dtype(self, exact: Outputs) -> dict[str, Any]:
        """What the converted model computes when it runs in the dtype that it was converted to."""
        dtype = next(iter(self.forms.values())).dtype
        ours = run_probe(self._ours("eager", dtype), self.probe, self.layout)
        values = ours.encoder if ours.logits is None else ours.logits
        finite = bool(values.isfinite().all())
        if not finite:
            self.differences.append(f"run in {short_name(dtype)}, it computes values that are not finite")
        return {"dtype": short_name(dtype), "finite": finite, "quantiles": _quantiles(ours, exact)}


class _OwnWeights(Mapping[str, torch.Tensor]):
    """Weights by the names of the FAT5 model."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = name in self._checkpoint.tensors
        return self._checkpoint.load(name if stored or name != "lm_head.weight" else "shared.weight")

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.tensors)

    def __len__(self) -> int:
        return len(self._checkpoint.tensors)


def _load_stock(checkpoint: Checkpoint, recognised: Recognised) -> Any:
    try:
        stock = stock_class(recognised.model_type, recognised.layout).from_pretrained(
            checkpoint.folder, dtype=torch.float32, attn_implementation="eager"
        )
    except (ValueError, TypeError, OSError, RuntimeError, StrictDataclassError) as error:
        what = "stock transformers, which verification compares with, cannot load it"
        raise ConvertError(f"{checkpoint.folder}: {what}: {error}") from error
    return stock.eval()


def _errors(ours: Outputs, oracle: Outputs) -> dict[str, float]:
    errors = {"encoder_error": _relative(ours.encoder, oracle.encoder)}
    if ours.logits is None or oracle.logits is None:
        return errors
    errors = {"logits_error": _relative(ours.logits, oracle.logits), **errors}
    if ours.loss is None or oracle.loss is None:
        return errors
    largest = float(oracle.logits.abs().max())
    # A log-probability moves by at most twice what the logits move.
    return errors | {"loss_error": abs(ours.loss - oracle.loss) / (2 * largest) if largest else abs(ours.loss)}


def _relative(ours: torch.Tensor, oracle: torch.Tensor) -> float:
    """Largest difference over the largest absolute value of the oracle."""
    largest = float(oracle.abs().max())
    difference = float((ours - oracle).abs().max())
    return difference / largest if largest else difference


def _quantiles(ours: Outputs, exact: Outputs) -> dict[str, float]:
    """Quantiles of the errors of logits (of an encoder: states), relative to the largest absolute value."""
    one, other = (o.encoder if o.logits is None else o.logits for o in (ours, exact))
    errors = (one - other).abs().flatten().sort().values
    largest = float(other.abs().max()) or 1.0
    places = {q: min(errors.numel() - 1, int(q / 100 * errors.numel())) for q in QUANTILES}
    return {f"{q:g}": float(errors[place]) / largest for q, place in places.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing bars and warning about what was decided here on purpose."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
