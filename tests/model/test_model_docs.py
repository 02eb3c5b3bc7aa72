"""The pages about the model: their code runs, and their table is the configuration's own."""

import inspect
import re
from pathlib import Path

import pytest
from toy_repo import write_repo

from fat5.model import FlashT5Config

DOCS = Path(__file__).parents[2] / "docs"


def run_blocks(page: str) -> dict:
    """Run the Python of a page from top to bottom, as a reader would, and return its variables."""
    variables: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {number}", "exec"), variables)
    return variables


@pytest.fixture
def converted(tmp_path, monkeypatch):
    """A small repo by the name that the pages use, in the current folder."""
    write_repo(tmp_path / "flan-t5-small-fat5")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_fine_tuning(converted):
    variables = run_blocks("fine-tuning.md")
    assert variables["logits"].argmax() == 1  # learned
    assert variables["written"] == "film"
    assert variables["loss"] < 0.1
    names = {type(variables[name]).__name__ for name in ("again", "tagger", "reader", "writer", "encoder")}
    assert names == {
        "FlashT5ForSequenceClassification",
        "FlashT5ForTokenClassification",
        "FlashT5ForQuestionAnswering",
        "FlashT5ForConditionalGeneration",
        "FlashT5EncoderModel",
    }
    for folder in ("classifier", "adapted", "embedder"):
        assert (converted / folder / "modeling_flash_t5.py").exists()


def test_configuration():
    assert run_blocks("configuration.md")["model"].config.position_encoding_type == "RoPE"


def test_every_field_is_documented_with_its_default():
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", (DOCS / "configuration.md").read_text(), re.MULTILINE)
    parameters = inspect.signature(FlashT5Config.__init__).parameters
    fields = {name: repr(field.default) for name, field in parameters.items() if name not in ("self", "kwargs")}
    assert dict(rows) == fields
