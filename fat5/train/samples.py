"""Span infilling on a few held-out examples, before the run and after it, for the eye."""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState

from fat5.folders import write_file

_LOOKED_AT = 512
_MOST_NEW = 64


class Samples(TrainerCallback):
    """Writes what the model generates, greedily, for the first held-out examples of each denoiser, as JSON.

    Args:
        path: the file: `before` and `after`, each a list of examples with `denoiser`, `input`, `target` and `output`.
        held_out: the held-out examples.
        collator: makes a batch of a list of them.
        denoisers: the names behind a batch's `denoiser`.
        each: examples of each denoiser.
        tokenizer: turns ids into text.
        autocast: the precision of the computation.
    """

    def __init__(
        self,
        path: Path,
        held_out: Any,
        collator: Callable[[Any], dict[str, Tensor]],
        denoisers: Sequence[str],
        each: int,
        tokenizer: PreTrainedTokenizerBase,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.path, self.tokenizer, self.autocast = path, tokenizer, autocast
        self.chosen: list[tuple[str, dict[str, Tensor]]] = []
        for index in range(min(len(held_out), _LOOKED_AT)):
            batch = collator([held_out[index]])
            name = denoisers[int(batch["denoiser"])]
            if sum(name == other for other, _ in self.chosen) < each:
                self.chosen.append((name, batch))
        self.chosen.sort(key=lambda pair: pair[0])

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._write("before", kwargs["model"], state)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            self._write("after", kwargs["model"], state)

    def _write(self, when: str, model: Any, state: TrainerState) -> None:
        examples = self._generate(model)  # on all processes: the parts of a sharded model are together only then
        if state.is_world_process_zero:
            before = read_samples(self.path) if when == "after" else {}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({**before, when: examples}, indent=1, ensure_ascii=False)
            write_file(self.path, (text + "\n").encode())

    @torch.no_grad()
    def _generate(self, model: Any) -> list[dict[str, str]]:
        was_training = model.training
        model.eval()
        examples = []
        for name, batch in self.chosen:
            inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
            with self.autocast():
                output = model.generate(**inputs, max_new_tokens=_MOST_NEW, do_sample=False, num_beams=1)
            fields = {"input": batch["input_ids"][0], "target": batch["labels"][0], "output": output[0, 1:]}
            examples.append({"denoiser": name} | {key: self._text(ids) for key, ids in fields.items()})
        model.train(was_training)
        return examples

    def _text(self, ids: Tensor) -> str:
        left_out = (-100, self.tokenizer.pad_token_id)
        return str(self.tokenizer.decode([i for i in ids.tolist() if i not in left_out]))


def read_samples(path: Path) -> dict[str, list[dict[str, str]]]:
    """Read what `Samples` wrote; empty if there is nothing."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
