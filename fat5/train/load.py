"""Load the model that a recipe names."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from fat5.model.configuration_flash_t5 import FlashT5Config
from fat5.model.modeling_flash_t5 import FlashT5ForConditionalGeneration
from fat5.train.errors import TrainingError
from fat5.train.options import ModelOptions
from fat5.train.recipe import Recipe

TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json")


def load_model(options: ModelOptions, *, bf16: bool = False) -> FlashT5ForConditionalGeneration:
    """Load a FAT5 repo's weights, from a folder or the Hub, in fp32 or rounded to bf16.

    The code is this package's, which is what the repo ships too, so no remote code is run.

    Raises:
        TrainingError: nothing is at the path, it is no FAT5 repo, or its weights do not fit its config.
    """
    _require_fat5(options)
    overrides: dict[str, Any] = {
        "dtype": torch.bfloat16 if bf16 else torch.float32,
        "revision": options.revision or "main",
    }
    if options.dropout_rate is not None:
        overrides["dropout_rate"] = options.dropout_rate
    if options.attn_implementation is not None:
        overrides["attn_implementation"] = options.attn_implementation
    try:
        loaded: Any = FlashT5ForConditionalGeneration.from_pretrained(
            options.path, output_loading_info=True, **overrides
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise TrainingError(f"cannot load model.path {options.path}: {error}") from error
    model, loading = loaded
    if absent := sorted(loading["missing_keys"]):
        raise TrainingError(f"model.path {options.path} lacks the weights of {absent[0]}; convert it again")
    return model


def fresh_model(
    options: ModelOptions, tokenizer: PreTrainedTokenizerBase, seed: int, *, bf16: bool = False
) -> FlashT5ForConditionalGeneration:
    """Make a model of new weights, of the architecture that a recipe describes, for a tokenizer.

    The embedding has a row for each id, and rows up to a multiple of 128, which matrix products on a GPU want.

    Raises:
        TrainingError: the architecture names something that a FlashT5Config does not have, or does not fit together.
    """
    known = FlashT5Config().to_dict()
    if unknown := sorted(set(options.fresh or {}) - set(known)):
        raise TrainingError(f"model.fresh.{unknown[0]} is nothing that FlashT5Config has; known: {', '.join(known)}")
    values: dict[str, Any] = {
        "vocab_size": -(-len(tokenizer) // 128) * 128,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    values |= options.fresh or {}
    if options.dropout_rate is not None:
        values["dropout_rate"] = options.dropout_rate
    if options.attn_implementation is not None:
        values["attn_implementation"] = options.attn_implementation
    torch.manual_seed(seed)
    try:
        model = FlashT5ForConditionalGeneration(FlashT5Config(**values))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TrainingError(f"model.fresh makes no model: {error}") from error
    return model.bfloat16() if bf16 else model


def load_or_make(recipe: Recipe) -> tuple[FlashT5ForConditionalGeneration, PreTrainedTokenizerBase]:
    """Give the model and the tokenizer of a run.

    Raises:
        TrainingError: what `load_model`, `fresh_model` or `load_tokenizer` say.
    """
    options, bf16 = recipe.model, recipe.training.precision.startswith("bf16_")
    if options.fresh is None:
        model = load_model(options, bf16=bf16)
        return model, load_tokenizer(options, model.config)
    tokenizer = load_tokenizer(options, FlashT5Config())
    return fresh_model(options, tokenizer, recipe.training.seed, bf16=bf16), tokenizer


def own_dropout(options: ModelOptions) -> float:
    """Read the dropout rate that the repo's configuration, or a fresh model's, states, whatever the run uses."""
    if options.fresh is not None:
        return FlashT5Config(**options.fresh).dropout_rate
    return FlashT5Config.from_pretrained(options.path, revision=options.revision or "main").dropout_rate


def _require_fat5(options: ModelOptions) -> None:
    advice = "`fat5convert MODEL OUT` makes such a folder of a T5 checkpoint"
    if options.path.count("/") != 1 and not Path(options.path).is_dir():  # asking the Hub could take a minute
        raise TrainingError(f"model.path {options.path} is no model's folder or Hub id: no such folder. {advice}")
    try:
        config, _ = FlashT5Config.get_config_dict(options.path, revision=options.revision or "main")
    except (OSError, ValueError, HFValidationError) as error:
        message = f"model.path {options.path} is no model's folder or Hub id: {str(error).rstrip('.')}. "
        raise TrainingError(message + advice) from error
    kind = config.get("model_type")
    if kind is None:
        message = f"model.path {options.path} is not a FAT5 checkpoint: no config.json there that names a model_type"
        raise TrainingError(f"{message} (a relative path begins in the current folder). {advice}")
    if kind != FlashT5Config.model_type:
        advice = "and no T5 that `fat5convert` makes one of"
        if kind in ("t5", "mt5", "umt5"):
            advice = f"run `fat5convert {options.path} OUT` first and give OUT as model.path"
        raise TrainingError(f"model.path {options.path} is not a FAT5 checkpoint (its model_type is {kind}); {advice}")


def load_tokenizer(options: ModelOptions, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside the weights.

    Args:
        options: where.
        config: the model's; without it, the configuration's own code would be asked for.

    Raises:
        TrainingError: there is none.
    """
    folder = Path(options.path)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise TrainingError(
            f"model.path {folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); copy the one there that the "
            "model was trained with, or make one by `fat5 train-tokenizer`"
        )
    try:
        return AutoTokenizer.from_pretrained(options.path, revision=options.revision or "main", config=config)
    except (OSError, ValueError) as error:
        raise TrainingError(f"model.path {options.path} has no tokenizer that loads: {error}") from error


def add_rows(model: FlashT5ForConditionalGeneration, rows: int) -> None:
    """Give the embedding, and the head, at least `rows` rows, for the tokens that a mixture adds.

    The new rows start at the mean of the old ones: the model then expects of a new token what it expects of the
    average one, and small updates make it what it is to be. The number is rounded up to a multiple of 64, which
    matrix products on a GPU want.
    """
    before = model.config.vocab_size
    if rows <= before:
        return
    model.resize_token_embeddings(rows, pad_to_multiple_of=64, mean_resizing=False)
    for name in ("shared.weight", "lm_head.weight"):  # one and the same, if tied
        weight = model.get_parameter(name).data
        weight[before:] = weight[:before].mean(0)
