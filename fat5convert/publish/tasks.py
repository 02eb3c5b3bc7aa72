"""What a model is for, by the auto-class that loads the whole of it: as its card says it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """Words for a card.

    `tags` are the Hub's, of which the first is taken unless the base model has another of them, or any other where
    `open_ended`. `text` and `call` are code, with `inputs` tokenized from `text` and `model` at hand.
    """

    tags: tuple[str, ...]
    call: str
    head: str = ""
    text: str = '"How old are you?"'
    open_ended: bool = False

    def tag(self, base: str | None) -> str:
        """The tag, given the base model's."""
        if base is None or base == "text2text-generation":  # which the Hub has given up
            return self.tags[0]
        return base if self.open_ended or base in self.tags else self.tags[0]


TASKS = {
    "AutoModelForSeq2SeqLM": Task(
        ("text-generation",),
        "print(tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True))",
        open_ended=True,
    ),
    "AutoModelForTextEncoding": Task(
        ("feature-extraction", "sentence-similarity"),
        "states = model(**inputs).last_hidden_state  # [1, tokens, width]",
    ),
    "AutoModelForSequenceClassification": Task(
        ("text-classification", "zero-shot-classification", "text-ranking"),
        "print(model(**inputs).logits)  # [1, labels]",
        "sequence classification",
    ),
    "AutoModelForTokenClassification": Task(
        ("token-classification",), "print(model(**inputs).logits)  # [1, tokens, labels]", "token classification"
    ),
    "AutoModelForQuestionAnswering": Task(
        ("question-answering",),
        "answer = model(**inputs)\nprint(answer.start_logits, answer.end_logits)  # [1, tokens] each",
        "question answering",
        '"How old are you?", "I am ten years old."',
    ),
}
OTHER = Task(("feature-extraction",), "states = model.get_encoder()(**inputs).last_hidden_state  # [1, tokens, width]")
"""Of a model without any head, its decoder's included."""
