"""The model's own tests under other releases of transformers, and repositories that cross from one to another."""

from itertools import permutations
from pathlib import Path

import pytest
from releases import RELEASES, run, run_tests

HERE = Path(__file__).parent

pytestmark = pytest.mark.versions


@pytest.mark.parametrize("release", [name for name in RELEASES if RELEASES[name]])
def test_every_test_of_the_model_passes(release, releases, tmp_path):
    tests = [file for file in sorted(HERE.glob("test_*.py")) if file != Path(__file__)]
    if release != "4.57":  # whose T5 `fat5.enable` does not know
        tests.append(HERE.parent / "test_enable.py")
    run_tests(release, releases, "not slow and not versions", *tests, cwd=tmp_path)


SAVE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from model_parity import SHAPE, batch, randomise
from fat5.model import FlashT5Config, FlashT5ForConditionalGeneration

config = FlashT5Config(**SHAPE, feed_forward_proj="gated-gelu", tie_word_embeddings=sys.argv[2] == "tied")
model = FlashT5ForConditionalGeneration(config).eval()
randomise(model)
model.save_pretrained("first")
inputs = batch("right")
torch.save({"inputs": inputs, "logits": model(**inputs).logits.detach()}, "expected.pt")
"""


@pytest.mark.parametrize(
    ("writer", "reader", "head"),
    [
        *((*pair, "untied") for pair in permutations(RELEASES, 2)),
        ("4.57", "current", "tied"),
        ("current", "4.57", "tied"),
    ],
)
def test_repositories_cross_releases(writer, reader, head, releases, tmp_path):
    run(writer, releases, "-c", SAVE, HERE, head, cwd=tmp_path)
    fresh = HERE / "fresh_process.py"
    run(reader, releases, fresh, "first", "expected.pt", "second", "delete", cwd=tmp_path)
    run(writer, releases, fresh, "second", "expected.pt", cwd=tmp_path)


HEADS_AND_POSITIONS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from model_parity import batch
from position_kinds import KINDS, kind_model
from test_model_heads import HEADS, head_batch, new_model

def save(name, auto_class, model, inputs, output):
    model.save_pretrained(name)
    with torch.no_grad():
        expected = model(**inputs)[output]
    case = {"auto_class": auto_class, "folder": name, "inputs": inputs, "output": output, "expected": expected}
    torch.save(case, name + ".pt")

for head, (_, _, auto) in HEADS.items():
    for reads_decoder in (False, True) if head != "tokens" else (False,):
        model = new_model(head, head_reads_decoder=reads_decoder)
        inputs = head_batch(head)
        save(f"{head}_{reads_decoder}", auto.__name__, model, inputs, "start_logits" if head == "answer" else "logits")
for kind in KINDS:
    inputs = {name: value for name, value in batch("left").items() if name != "labels"}
    save(kind, "AutoModelForSeq2SeqLM", kind_model(kind, "sdpa"), inputs, "logits")
"""


@pytest.mark.parametrize(("writer", "reader"), list(permutations(RELEASES, 2)))
def test_heads_and_positions_cross_releases(writer, reader, releases, tmp_path):
    run(writer, releases, "-c", HEADS_AND_POSITIONS, HERE, cwd=tmp_path)
    files = sorted(tmp_path.glob("*.pt"))
    assert len(files) == 13
    run(reader, releases, HERE / "fresh_heads.py", *files, cwd=tmp_path)
    run(writer, releases, HERE / "fresh_heads.py", *files, cwd=tmp_path)  # the reader has saved them again
