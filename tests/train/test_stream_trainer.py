"""Training on streamed corpora: the same batches and losses, however often the run is stopped."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from stream_processes import BLOCK, BLOCK_OF_ROWS, Used, recording

import fat5.data.setup
from fat5.cli import main
from fat5.train.checkpoints import MARKER
from fat5.train.recipe import differences, load_recipe
from fat5.train.stream_trainer import STATE_FILE, StreamTrainer

HERE = Path(__file__).parent
SMOKE = HERE.parents[1] / "recipes" / "smoke.yaml"


@pytest.fixture
def batches(monkeypatch):
    """The hashes of the batches that are used, in order; `stop_at` kills the run in the middle of that batch."""
    used = Used()
    monkeypatch.setattr(StreamTrainer, "training_step", recording(used, StreamTrainer.training_step))
    return used


@pytest.fixture(autouse=True)
def _blocks_of_the_size_of_the_toy(monkeypatch):
    monkeypatch.setattr(fat5.data.setup, "_BLOCK", BLOCK)
    monkeypatch.setattr(fat5.data.setup, "_BLOCK_OF_ROWS", BLOCK_OF_ROWS)


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


def in_two_processes(folder, arguments, name, stop_at=-1):
    """What two processes use of the stream, in the stream's order; whether they fail as they are told to."""
    (folder / "settings.json").write_text(json.dumps(arguments))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [HERE / "stream_processes.py", SMOKE, folder / "settings.json", folder / name, stop_at]
    paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run([*command, *map(str, script)], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (stop_at < 0), done.stdout[-3000:] + done.stderr[-6000:]
    ranks = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
    return [batch for step in zip(*ranks, strict=True) for batch in step]


@pytest.mark.slow
def test_two_processes_share_a_stream_and_its_checkpoints_serve_any_number(toy, tmp_path, batches):
    # Dropout is each process's own.
    make = {"model__dropout_rate": 0.0, "data__packing": "segments", "data__evaluation": "[]"}
    runs = {name: settings(toy, tmp_path, tmp_path / name, "both", **make) for name in ("one", "halved", "doubled")}
    assert run(runs["one"]).exit_code == 0
    expected = list(batches)
    assert len(set(expected)) == 16
    # Begun by two and continued by one, and the other way round; killed in the middle of step 5.
    assert in_two_processes(tmp_path, runs["halved"], "halved", stop_at=5) == expected[:10]
    batches.clear()
    assert run(runs["halved"]).exit_code == 0
    assert batches == expected[8:]
    batches.clear()
    batches.stop_at = 10
    assert run(runs["doubled"]).exit_code != 0
    assert batches == expected[:10]
    assert in_two_processes(tmp_path, runs["doubled"], "doubled") == expected[8:]
    weights = {name: load_file(tmp_path / name / "model" / "model.safetensors") for name in runs}
    for key, weight in weights["one"].items():
        for name in ("halved", "doubled"):
            torch.testing.assert_close(weights[name][key], weight, rtol=1e-4, atol=2e-5, msg=f"{name} {key}")


@pytest.mark.parametrize(
    "change", ["data.packing=stream", "data.train=[{files: [x], streaming: true}]", "data.window=9"]
)
def test_micro_batches_may_change_only_where_batches_are_cut_from_the_same_rows(toy, tmp_path, change):
    common = [*toy.settings(tmp_path / "out"), change]
    one, two = (load_recipe(SMOKE, [*common, f"training.micro_batch_size={n}"]) for n in (1, 2))
    changed = differences(one, two)
    assert changed == ([] if "window" in change else ["training.micro_batch_size: 1 -> 2"])
