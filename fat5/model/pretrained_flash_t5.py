"""What all FlashT5 models share."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .attention import ATTENTION_FUNCTIONS
from .configuration_flash_t5 import FlashT5Config
from .flash_attention import FLASH_ATTENTION, why_not_flash
from .norm_flash_t5 import FlashT5LayerNorm
from .packed_inputs import shift_right
from .position_fire import FirePositionBias
from .runtime_files import copy_runtime_files
from .stack_flash_t5 import FlashT5Stack

REPEATED_EMBEDDINGS = [r"^(en|de)coder\.embed_tokens\.weight$"]
"""Other tools' files may repeat the embedding, which is `shared` here, under these names."""
OF_NO_EFFECT = (
    *("cache_position", "position_ids", "num_items_in_batch"),  # of transformers: a T5 knows its places by itself
    *("token_type_ids", "special_tokens_mask", "offset_mapping"),  # of tokenizers
)
"""Arguments that callers hand to every model, and that no T5 has a use for where `forward` does not name them."""


class FlashT5PreTrainedModel(PreTrainedModel):
    """What all FlashT5 models share: loading, saving, initialisation."""

    config: FlashT5Config
    shared: nn.Module
    encoder: FlashT5Stack
    config_class = FlashT5Config
    base_model_prefix = "transformer"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _no_split_modules = ["FlashT5Block"]  # noqa: RUF012 (declared without ClassVar in transformers)
    _keep_in_fp32_modules = ["wo"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = REPEATED_EMBEDDINGS

    def embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings `[B, L, D]` of ids `[B, L]`, or those given in their place.

        Raises:
            ValueError: unless exactly one of the two is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "Give exactly one of `input_ids` and `inputs_embeds`, and to a model with a decoder exactly one of "
                "`decoder_input_ids` and `decoder_inputs_embeds`, or `labels`. The encoder alone is what "
                "AutoModelForTextEncoding loads from the same repo, in place of AutoModel."
            )
        return self.shared(input_ids) if inputs_embeds is None else inputs_embeds

    def refuse_others(self, arguments: dict[str, Any]) -> None:
        """Look at what `forward` was given and does not name: stock T5 takes everything, whether it heeds it or not.

        Raises:
            TypeError: if there is a value, other than None, that a caller may expect to matter, and it would not.
        """
        others = [name for name, value in arguments.items() if value is not None and name not in OF_NO_EFFECT]
        if others:
            raise TypeError(f"{type(self).__name__} has no argument {', '.join(others)}: it would have no effect.")

    @property
    def model_dim(self) -> int:
        """Width of the hidden states, by the name that it has in stock T5."""
        return self.config.d_model

    def _shift_right(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Decoder inputs of labels `[B, L]`, by the name that scripts for stock T5 call."""
        return shift_right(input_ids, None, self.config.decoder_start_token_id, self.config.pad_token_id)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding that encoder and decoder share."""
        return self.shared

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of encoder and decoder."""
        self.shared = value

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """The encoder, whatever the modality."""
        return self.encoder

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """The implementation that a request stands for, "fat5" where there is none.

        "fat5" and "flash_attention_2" are resolved call by call: the kernels on the devices that have them, sdpa on
        others.

        Raises:
            ValueError: if FlashT5 has no such implementation.
        """
        implementation = "fat5" if requested_attention is None else requested_attention
        reason = None
        if implementation == FLASH_ATTENTION:
            reason = why_not_flash(self.config)
        elif implementation not in ATTENTION_FUNCTIONS:
            reason = "does not exist here"
        if reason is not None:
            raise ValueError(
                f'Specified `attn_implementation="{implementation}"` is not supported: it {reason}. FlashT5 runs on '
                f"{', '.join(ATTENTION_FUNCTIONS)}."
            )
        return implementation

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as in transformers, and always with the code files that the saved `auto_map` names.

        Into the folder above a checkpoint of `Trainer` as well: with `push_to_hub` it publishes that one after each
        checkpoint, and copies weights and configuration there, but no code. `Trainer`'s saves are told from those of
        a user, whose folders are left alone, by their always giving `state_dict`, be it None.
        """
        if kwargs.get("is_main_process", args[0] if args else True):
            copy_runtime_files(save_directory)
            folder = Path(save_directory).absolute()
            if "state_dict" in kwargs and re.fullmatch(r"checkpoint-\d+", folder.name):
                copy_runtime_files(folder.parent)
        super().save_pretrained(save_directory, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """T5's initialisation (Mesh TensorFlow's, as in `transformers`), scaled by `initializer_factor`.

        Layers carry their standard deviation as `init_std`, without which it is 1 (embedding and head), because
        transformers 5 calls this only on modules that own parameters. It guards `torch.nn.init` against overwriting
        loaded weights.
        """
        factor = self.config.initializer_factor
        if isinstance(module, FlashT5LayerNorm):
            nn.init.constant_(module.weight, factor)
        elif isinstance(module, FirePositionBias):
            module.reset_parameters()
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=factor * getattr(module, "init_std", 1.0))
            bias = getattr(module, "bias", None)
            if isinstance(bias, torch.Tensor):
                nn.init.zeros_(bias)
