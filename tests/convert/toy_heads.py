"""Small stock T5 checkpoints with the heads for classification and question answering."""

from pathlib import Path
from typing import Any

import torch
import transformers
from toy_checkpoints import FAMILIES, SIZES, TOKENS, edit_config

SEQUENCE, TOKEN, ANSWER = TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
PREFIXES = {"t5-v1.0": "T5", "t5-v1.1": "T5", "mt5": "MT5", "umt5": "UMT5"}


def write_headed(folder: Path, task: str, family: str = "t5-v1.1", **changes: Any) -> Any:
    """A stock model with a head, every tensor random and distinct, as stock saves it."""
    shape = FAMILIES[family]
    labels = {} if task == ANSWER else {"id2label": {0: "no", 1: "yes", 2: "perhaps"}}
    if labels:
        labels["label2id"] = {name: i for i, name in labels["id2label"].items()}  # type: ignore[misc]
    config = shape.config_class(**(SIZES | TOKENS | shape.fields | labels | changes))
    model: Any = getattr(transformers, f"{PREFIXES[family]}For{task}")(config).eval()
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("layer_norm" in name), 0.2, generator=generator)
    model.save_pretrained(folder)
    if family != "umt5":
        edit_config(folder, tie_word_embeddings=False if shape.untied else None, scale_decoder_outputs=None)
    return model
