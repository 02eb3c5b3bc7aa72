"""What `output.report_to` sends to trackers, where they are installed."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from fat5.cli import main
from fat5.train.recipe import load_recipe
from fat5.train.typed import to_plain

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"


def run(toy, tracker: str, out: Path, *more: str):
    settings = toy.settings(out, output__report_to=f"[{tracker}]", evaluation__samples=0)
    arguments = [part for setting in settings for part in ("--set", setting)]
    return CliRunner().invoke(main, ["pretrain", str(SMOKE), *arguments, *more])


def series(out: Path) -> dict[str, list[float]]:
    """The figures of a log, first to last, by the names under which trackers get them."""
    found: dict[str, list[float]] = {}
    for entry in map(json.loads, (out / "log.jsonl").read_text().splitlines()):
        if "train_runtime" not in entry:
            for key, value in entry.items():
                name = f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
                found.setdefault(name, []).append(value)
    del found["train/step"]
    assert {"train/loss", "train/tokens_per_second", "eval/loss"} < found.keys()
    return found


def recipe_of(out: Path) -> dict:
    return json.loads(json.dumps(to_plain(load_recipe(out / "recipe.yaml"))))


def test_tensorboard_gets_what_the_log_has(toy, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    out = tmp_path / "out"
    assert run(toy, "tensorboard", out).exit_code == 0
    [folder] = (out / "checkpoints" / "runs").iterdir()
    events = accumulator(str(folder))
    events.Reload()
    for name, values in series(out).items():
        assert [scalar.value for scalar in events.Scalars(name)] == pytest.approx(values, rel=1e-6), name
    [text] = events.Tensors("args/text_summary")
    assert json.loads(text.tensor_proto.string_val[0]) == recipe_of(out)


def test_wandb_gets_what_the_log_has(toy, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    out = tmp_path / "out"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    result = run(toy, "wandb", out)
    assert result.exit_code == 0, result.output
    assert wandb.run.name == "out"
    config, summary = dict(wandb.run.config), dict(wandb.run.summary)  # of each figure, the last
    wandb.finish()
    for name, values in series(out).items():
        assert summary[name] == pytest.approx(values[-1]), name
    expected = recipe_of(out)
    assert {key: config[key] for key in expected} == expected


def test_trackio_gets_what_the_log_has(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    out = tmp_path / "out"
    result = run(toy, "trackio", out)
    assert result.exit_code == 0, result.output
    logs = storage.get_logs("huggingface", "out")
    for name, values in series(out).items():
        assert [entry[name] for entry in logs if name in entry] == pytest.approx(values), name
    config, expected = storage.get_run_config("huggingface", "out"), recipe_of(out)
    assert {key: config[key] for key in expected} == expected


def test_a_tracker_that_is_not_installed_is_named(toy, tmp_path, monkeypatch):
    monkeypatch.setattr("fat5.train.arguments.find_spec", lambda name: None)
    result = run(toy, "trackio", tmp_path / "out", "--dry-run")
    assert result.exit_code == 1
    assert "output.report_to names trackio, which is not installed" in result.output


def test_a_tracker_that_refuses_is_named(toy, tmp_path, monkeypatch):
    """As wandb does without a login."""
    refusal = type("Refusal", (Exception,), {"__module__": "trackio.errors"})

    def refuse(**kwargs):
        raise refusal("no key")

    tracker = ModuleType("trackio")
    tracker.__spec__, tracker.init = ModuleSpec("trackio", None), refuse
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_trackio_available", lambda: True)
    result = run(toy, "trackio", tmp_path / "out")
    assert result.exit_code == 1
    assert "Error: output.report_to: trackio does not take the log (no key)" in result.output
