"""The heads that stock T5 has beside the language model's, as data, and what a config says of their labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from fat5convert.errors import ConvertError

Task = Literal["SequenceClassification", "TokenClassification", "QuestionAnswering"]


class Head(NamedTuple):
    """A head. Stock, FAT5 and auto-classes end in `For` and its task, whatever they begin with."""

    task: Task
    title: str
    marker: str  # a tensor that a model has with this head and with no other
    prefix: str  # of the tensors that are not the head's, in stock files
    reads_decoder: bool  # in stock T5; in the published FAT5 none does

    @property
    def is_stock(self) -> bool:
        """Whether stock T5 has such a head."""
        return self in HEADS

    def on_encoder(self) -> Head:
        """The head of this task in the published FAT5. Its T5 names are those of the oracle (`encoder_heads`)."""
        return self._replace(reads_decoder=False, prefix="transformer.")


HEADS = (
    Head("SequenceClassification", "sequence classification", "classification_head.dense.weight", "transformer.", True),
    Head("TokenClassification", "token classification", "classifier.weight", "transformer.", False),
    Head("QuestionAnswering", "question answering", "qa_outputs.weight", "", True),
)


def read_head(raw: Mapping[str, Any], tensors: Iterable[str]) -> tuple[Head | None, str]:
    """Which head a checkpoint has, by its tensors or else by the architecture that its config states, and why.

    Raises:
        ConvertError: the one contradicts the other.
    """
    names = set(tensors)
    found = next((head for head in HEADS if head.marker in names), None)
    stated = next((head for head in HEADS for name in architectures(raw) if name.endswith(f"For{head.task}")), None)
    if found and stated and found is not stated:
        raise ConvertError(f"architectures {raw['architectures']!r} contradicts the file, which has {found.marker}")
    if found:
        return found, f"the file has {found.marker}"
    if stated:
        return stated, f"config.json has architectures {raw['architectures']!r}"
    return None, "no architecture and no tensor of another head"


def architectures(raw: Mapping[str, Any]) -> list[str]:
    """The architectures that a config states; none if it states something else."""
    stated = raw.get("architectures")
    return [name for name in stated if isinstance(name, str)] if isinstance(stated, list) else []


def read_labels(raw: Mapping[str, Any], head: Head) -> dict[str, Any]:
    """The fields of FlashT5Config that a head needs: `id2label`, `label2id`, and `problem_type` where it is stated.

    Raises:
        ConvertError: labels that are not numbered from 0 on, or of which there are too few or too many.
    """
    labels = raw.get("id2label")
    if labels is None:
        count = raw.get("num_labels", 2)
        if type(count) is not int or not 0 < count < 1 << 20:
            raise ConvertError(f"num_labels must be a positive integer, not {count!r}")
        labels = {str(i): f"LABEL_{i}" for i in range(count)}
    if not isinstance(labels, dict) or not labels or set(labels) != {str(i) for i in range(len(labels))}:
        raise ConvertError("id2label must give every label a name, numbered from 0 on without gaps")
    if not all(isinstance(name, str) for name in labels.values()):
        raise ConvertError("id2label must give every label a name")
    if head.task == "QuestionAnswering" and len(labels) != 2:
        raise ConvertError(f"question answering has two outputs, start and end, not {len(labels)} labels")
    numbers = raw.get("label2id") or {name: int(i) for i, name in labels.items()}
    if not isinstance(numbers, dict) or not all(type(number) is int for number in numbers.values()):
        raise ConvertError("label2id must give every name its number")
    fields = {"id2label": labels, "label2id": numbers}
    problem = raw.get("problem_type")
    if problem is not None:
        known = ("regression", "single_label_classification", "multi_label_classification")
        if problem not in known:
            raise ConvertError(f"problem_type {problem!r} is unknown; supported are {', '.join(known)}")
        fields["problem_type"] = problem
    return fields
