"""Training on streamed corpora: the same batches and losses, however often the run is stopped."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import fat5.data.setup
from fat5.cli import main
from fat5.train.checkpoints import MARKER
from fat5.train.recipe import differences, load_recipe
from fat5.train.stream_trainer import STATE_FILE, StreamTrainer

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"


@pytest.fixture
def batches(monkeypatch):
    """The hashes of the batches that are used, in order; `stop_at` kills the run in the middle of that batch."""
    used = Used()
    step = StreamTrainer.training_step

    def record(self, model, inputs, *rest):
        tensors = sorted((name, x.tolist()) for name, x in inputs.items() if isinstance(x, torch.Tensor))
        used.append(hashlib.sha256(json.dumps(tensors).encode()).hexdigest())
        if len(used) == used.stop_at:
            raise KeyboardInterrupt
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(StreamTrainer, "training_step", record)
    return used


@pytest.fixture(autouse=True)
def _blocks_of_the_size_of_the_toy(monkeypatch):
    monkeypatch.setattr(fat5.data.setup, "_BLOCK", 24)
    monkeypatch.setattr(fat5.data.setup, "_BLOCK_OF_ROWS", 6)


class Used(list):
    stop_at = -1


def settings(toy, folder, out, kind, **changes):
    lines = toy.train.read_text().splitlines()
    for name, part in (("a", lines[:18]), ("b", lines[18:])):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "train.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in part))
    sources = {
        "files": f"{{files: ['{folder}/a/train.jsonl'], format: jsonl, streaming: true, weight: 2}}",
        "dataset": f"{{dataset: '{folder}/b', streaming: true, weight: 1}}",
    }
    train = ", ".join(sources.values()) if kind == "both" else sources[kind]
    options = {"data__train": f"[{train}]", "training__steps": 8, "evaluation__every": 4, "output__save_every": 2}
    return toy.settings(out, output__keep_checkpoints=9, **(options | changes))


def run(arguments):
    return CliRunner().invoke(main, ["pretrain", str(SMOKE), *(p for s in arguments for p in ("--set", s))])


def log(folder):
    """The entries, less what depends on the clock."""
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    timed = {"tokens_per_second", "tflops", "mfu", "data_wait"}
    return [
        {key: value for key, value in entry.items() if key not in timed}
        for entry in entries
        if "train_runtime" not in entry
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "packing"),
    [
        ("files", "none"),
        ("dataset", "segments"),
        ("both", "stream"),
    ],
)
def test_a_killed_run_goes_on_with_the_next_batch(toy, tmp_path, batches, kind, packing):
    make = {"data__packing": packing}
    result = run(settings(toy, tmp_path, tmp_path / "whole", kind, **make))
    assert result.exit_code == 0, result.output
    expected = list(batches)
    assert len(expected) == 16
    assert len(set(expected)) == 16, "batches repeat: the test could not tell a wrong place"
    arguments = settings(toy, tmp_path, tmp_path / "killed", kind, **make)
    batches.clear()
    batches.stop_at = 10  # in the middle of the step after the checkpoint of step 4
    assert run(arguments).exit_code != 0
    batches.clear()
    batches.stop_at = -1
    result = run([*arguments, "training.loader_workers=2"] if kind == "both" else arguments)
    assert result.exit_code == 0, result.output
    assert batches == expected[8:]
    assert log(tmp_path / "killed") == log(tmp_path / "whole")
    weights, others = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(weights[name], others[name]) for name in others)
    assert not (tmp_path / "whole" / "model" / STATE_FILE).exists()


def test_a_checkpoint_with_a_damaged_place_is_refused(toy, tmp_path):
    arguments = settings(toy, tmp_path, tmp_path / "out", "files", training__steps=4)
    assert run(arguments).exit_code == 0
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "checkpoint-4")
    checkpoint = tmp_path / "out" / "checkpoints" / "checkpoint-2"
    place = checkpoint / STATE_FILE
    place.write_text("?" * place.stat().st_size)
    result = run(arguments)
    assert result.exit_code == 1
    assert f"{checkpoint} is not whole ({STATE_FILE} is damaged)" in result.output
    place.unlink()  # as in a checkpoint of a run whose corpora were not streamed
    (checkpoint / MARKER).write_text(json.dumps({"files": {}}))
    result = run(arguments)
    assert result.exit_code == 1
    assert f"checkpoint-2/{STATE_FILE}, which tells the place in the streamed corpora" in result.output


@pytest.mark.parametrize(
    "change", ["data.packing=stream", "data.train=[{files: [x], streaming: true}]", "data.window=9"]
)
def test_micro_batches_may_change_only_where_batches_are_cut_from_the_same_rows(toy, tmp_path, change):
    common = [*toy.settings(tmp_path / "out"), change]
    one, two = (load_recipe(SMOKE, [*common, f"training.micro_batch_size={n}"]) for n in (1, 2))
    changed = differences(one, two)
    assert changed == ([] if "window" in change else ["training.micro_batch_size: 1 -> 2"])
