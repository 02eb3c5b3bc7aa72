"""Run stock `transformers` and the converted model on the same fixed probes, and compare what they compute.

Both run in fp32 on the CPU. The oracle is stock T5, eager. For umT5 it is stock's decoder states under an unscaled
head: transformers 5 multiplies umT5's decoder output by d_model**-0.5, which the model was not trained with.
For a lossy dtype the oracle's weights are rounded first: what then remains is the conversion's own error, held to
the same bounds; what the rounding itself does to the logits is measured and stated beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    T5ForConditionalGeneration,
    UMT5ForConditionalGeneration,
)
from transformers.utils import logging

from fat5.model import FlashT5ForConditionalGeneration
from fat5convert.errors import ConvertError
from fat5convert.families import Recognised
from fat5convert.source import Checkpoint, local

# Largest error relative to the largest value compared with.
BOUNDS = {"eager": 1e-5, "sdpa": 1e-4}
STOCK_CLASSES: dict[str, type[PreTrainedModel]] = {
    "t5": T5ForConditionalGeneration,
    "mt5": MT5ForConditionalGeneration,
    "umt5": UMT5ForConditionalGeneration,
}

# Beyond 128 positions, so that the far buckets are seen from both sides; the shorter rows are padded.
_ENCODER_LENGTHS = (160, 57, 3)
_DECODER_LENGTHS = (140, 24, 2)
_NEW_TOKENS = 16


@dataclass(frozen=True)
class Probe:
    """Token ids made from a fixed seed, padded on the right: the same for every model of a vocabulary."""

    input_ids: torch.Tensor  # [B, Le]
    attention_mask: torch.Tensor  # [B, Le]
    labels: torch.Tensor  # [B, Ld], -100 where padded


@dataclass(frozen=True)
class Outputs:
    """What a model computes on the probe, at real positions only."""

    logits: torch.Tensor  # [real decoder positions, V]
    encoder: torch.Tensor  # [real encoder positions, D]
    loss: float
    tokens: torch.Tensor  # [B, new tokens]


def make_probe(vocab_size: int, pad_token_id: int | None) -> Probe:
    """Random token ids for batch rows of unequal length."""
    generator = torch.Generator().manual_seed(0)
    rows, longest, target = len(_ENCODER_LENGTHS), max(_ENCODER_LENGTHS), max(_DECODER_LENGTHS)
    input_ids = torch.randint(vocab_size, (rows, longest), generator=generator)
    labels = torch.randint(vocab_size, (rows, target), generator=generator)
    attention_mask = (torch.arange(longest) < torch.tensor(_ENCODER_LENGTHS)[:, None]).long()
    real_labels = torch.arange(target) < torch.tensor(_DECODER_LENGTHS)[:, None]
    return Probe(
        input_ids.masked_fill(attention_mask == 0, pad_token_id or 0),
        attention_mask,
        labels.masked_fill(~real_labels, -100),
    )


def compare_models(folder: Path, checkpoint: Checkpoint, recognised: Recognised) -> tuple[dict[str, Any], list[str]]:
    """Compare the FAT5 model in `folder` with stock `transformers` on the source checkpoint.

    Returns:
        The figures for `parity.json`, and the differences found in words (none: they agree).
    """
    config = recognised.config
    probe = make_probe(config["vocab_size"], config["pad_token_id"])
    generation = GenerationConfig(
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        decoder_start_token_id=config["decoder_start_token_id"],
        eos_token_id=config["eos_token_id"],
        pad_token_id=config["pad_token_id"],
    )
    out = Checkpoint(local(folder))
    differences: list[str] = []
    with _quiet():
        oracle, rounding = _run_stock(checkpoint, recognised, out, probe, generation, differences)
        results = []
        for implementation, bound in BOUNDS.items():
            model = FlashT5ForConditionalGeneration.from_pretrained(
                folder, dtype=torch.float32, attn_implementation=implementation
            ).eval()
            result = _compare(_run(model, probe, generation), oracle, bound)
            differences += [f"{implementation}: {problem}" for problem in result.pop("problems")]
            results.append({"attn_implementation": implementation, **result})
            del model
    probes = {"encoder_lengths": list(_ENCODER_LENGTHS), "decoder_lengths": list(_DECODER_LENGTHS)}
    return {"probes": probes, "implementations": results, "rounding": rounding}, differences


def _run_stock(
    checkpoint: Checkpoint,
    recognised: Recognised,
    out: Checkpoint,
    probe: Probe,
    generation: GenerationConfig,
    differences: list[str],
) -> tuple[Outputs, dict[str, Any] | None]:
    """Run the oracle, with its weights rounded as those of OUT are; and what that rounding changes, if anything."""
    stock = _load_stock(checkpoint, recognised)
    if not recognised.layout.tied and not torch.equal(stock.lm_head.weight, checkpoint.load("lm_head.weight").float()):
        differences.append("stock transformers did not load the lm_head of the file, and is no oracle for it")
    unscaled = recognised.model_type == "umt5"
    exact = _run(stock, probe, generation, unscaled)
    lossy = _round_like(stock, recognised, out)
    if not lossy:
        return exact, None
    rounded = _run(stock, probe, generation, unscaled)
    return rounded, {
        "logits_error": _relative(rounded.logits, exact.logits),
        "encoder_error": _relative(rounded.encoder, exact.encoder),
        "loss_error": abs(rounded.loss - exact.loss),
        "greedy_identical": torch.equal(rounded.tokens, exact.tokens),
    }


def _load_stock(checkpoint: Checkpoint, recognised: Recognised) -> Any:
    try:
        stock = STOCK_CLASSES[recognised.model_type].from_pretrained(
            checkpoint.folder, dtype=torch.float32, attn_implementation="eager"
        )
    except (ValueError, TypeError, OSError, RuntimeError, StrictDataclassError) as error:
        what = "stock transformers, which verification compares with, cannot load it"
        raise ConvertError(f"{checkpoint.folder}: {what}: {error}") from error
    return stock.eval()


@torch.no_grad()
def _round_like(stock: PreTrainedModel, recognised: Recognised, out: Checkpoint) -> bool:
    """Round each weight of the oracle to the dtype it has in OUT; whether that changed any."""
    parameters = dict(stock.named_parameters())
    changed = False
    for pair in recognised.pairs:
        # However the file names the embedding, the model calls it `shared`.
        weight = parameters[pair.t5 if pair.t5 in parameters else "shared.weight"]
        rounded = weight.to(out.tensors[pair.fat5].dtype).float()
        changed = changed or not torch.equal(rounded, weight)
        weight.copy_(rounded)
    return changed


@torch.no_grad()
def _run(model: Any, probe: Probe, generation: GenerationConfig, unscaled: bool = False) -> Outputs:
    output = model(
        input_ids=probe.input_ids,
        attention_mask=probe.attention_mask,
        labels=probe.labels,
        output_hidden_states=unscaled,
    )
    logits, loss = output.logits, output.loss
    if unscaled:
        logits = model.lm_head(output.decoder_hidden_states[-1])
        loss = F.cross_entropy(logits.flatten(0, 1), probe.labels.flatten(), ignore_index=-100)
    model.generation_config = generation  # whose every setting else comes from the checkpoint
    tokens = model.generate(
        input_ids=probe.input_ids, attention_mask=probe.attention_mask, generation_config=generation
    )
    return Outputs(
        logits[probe.labels != -100],
        output.encoder_last_hidden_state[probe.attention_mask == 1],
        float(loss),
        tokens,
    )


def _compare(ours: Outputs, oracle: Outputs, bound: float) -> dict[str, Any]:
    largest = float(oracle.logits.abs().max())
    errors = {
        "logits_error": _relative(ours.logits, oracle.logits),
        "encoder_error": _relative(ours.encoder, oracle.encoder),
        # A log-probability moves by at most twice what the logits move.
        "loss_error": abs(ours.loss - oracle.loss) / (2 * largest) if largest else abs(ours.loss),
    }
    identical = torch.equal(ours.tokens, oracle.tokens)
    # Written so that NaN is a problem too.
    problems = [f"{name} {error:.2e} above {bound:.0e}" for name, error in errors.items() if not error <= bound]
    if not identical:
        problems.append("greedy tokens differ")
    return {
        "bound": bound,
        "largest_logit": largest,
        **errors,
        "loss": ours.loss,
        "oracle_loss": oracle.loss,
        "greedy_identical": identical,
        "problems": problems,
    }


def _relative(ours: torch.Tensor, oracle: torch.Tensor) -> float:
    """Largest difference over the largest absolute value of the oracle."""
    largest = float(oracle.abs().max())
    difference = float((ours - oracle).abs().max())
    return difference / largest if largest else difference


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
