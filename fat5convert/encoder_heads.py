"""Stock T5's encoder under the heads of the published FAT5 that stock T5 has on its decoder: the oracle for them.

Written from the published classes and not from `fat5.model`, so that the two are held against each other.
Source: https://github.com/catie-aq/flashT5 (`src/model/custom_heads_flash_t5.py`), Apache-2.0.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import T5Config, T5EncoderModel


class SequenceClassificationOracle(nn.Module):
    """A tanh layer and a linear one on the state at the last end-of-sequence token."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        labels: Any = config.num_labels
        dense, out = nn.Linear(config.d_model, config.d_model), nn.Linear(config.d_model, labels)
        self.transformer = T5EncoderModel(config)
        self.classification_head = nn.ModuleDict({"dense": dense, "out_proj": out})
        self.eos_token_id = config.eos_token_id

    def forward(self, input_ids: torch.Tensor, **options: Any) -> SimpleNamespace:
        """Logits `[B, num_labels]` of ids `[B, L]`, and the hidden states."""
        output = self.transformer(input_ids=input_ids, **options)
        states = []
        for ids, row in zip(input_ids, output.last_hidden_state, strict=True):
            states.append(row[ids == self.eos_token_id][-1])
        dense, out = self.classification_head["dense"], self.classification_head["out_proj"]
        return SimpleNamespace(logits=out(torch.tanh(dense(torch.stack(states)))), hidden_states=output.hidden_states)


class QuestionAnsweringOracle(nn.Module):
    """A linear layer of two outputs on every state: where the answer begins, and where it ends."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.transformer = T5EncoderModel(config)
        self.qa_outputs = nn.Linear(config.d_model, 2)

    def forward(self, input_ids: torch.Tensor, **options: Any) -> SimpleNamespace:
        """Logits `[B, L]` of the first and of the last token of the answer, and the hidden states."""
        output = self.transformer(input_ids=input_ids, **options)
        start, end = self.qa_outputs(output.last_hidden_state).unbind(-1)
        return SimpleNamespace(start_logits=start, end_logits=end, hidden_states=output.hidden_states)


ORACLES: dict[str, type[nn.Module]] = {
    "SequenceClassification": SequenceClassificationOracle,
    "QuestionAnswering": QuestionAnsweringOracle,
}
"""By the task of the head."""
