"""Runs that go on: in bf16 weights, and for longer than they were meant to."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from fat5.cli import main
from fat5.train.throughput import CLOCKED

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
QUICK = {"evaluation__every": 100, "evaluation__samples": 0, "training__optimizer": "adamw_scale"}


def run(settings: list[str], *more: str):
    return CliRunner().invoke(main, ["pretrain", str(SMOKE), *(p for s in settings for p in ("--set", s)), *more])


def outcome(out: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    entries = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    log = [{k: v for k, v in e.items() if k not in CLOCKED} for e in entries if "train_runtime" not in e]
    return log, load_file(out / "model" / "model.safetensors")


def same(found: Path, expected: Path) -> None:
    (log, weights), (wanted_log, wanted) = outcome(found), outcome(expected)
    assert log == wanted_log
    assert weights.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(weights[name], wanted[name]), name


@pytest.mark.parametrize("precision", ["bf16_kahan", pytest.param("bf16_stochastic", marks=pytest.mark.slow)])
def test_a_run_with_bf16_weights_resumes_bit_by_bit(toy, tmp_path, precision):
    changes = QUICK | {"training__precision": precision, "training__steps": 4}
    assert run(toy.settings(tmp_path / "whole", **changes)).exit_code == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "model")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "checkpoint-4")
    result = run(toy.settings(tmp_path / "out", **changes))
    assert result.exit_code == 0, result.output
    same(tmp_path / "out", tmp_path / "whole")
    weights = outcome(tmp_path / "out")[1]
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    before = load_file(toy.model / "model.safetensors")
    assert not torch.equal(weights["lm_head.weight"], before["lm_head.weight"].bfloat16())


@pytest.mark.slow
def test_a_wsd_run_is_extended_from_before_its_decay_as_if_it_had_been_longer(toy, tmp_path):
    changes = QUICK | {
        "training__schedule": "wsd",
        "training__schedule_options": "{decay_steps: 2, decay: linear}",
        "evaluation__every": 4,
        "output__keep_checkpoints": 9,
    }
    assert run(toy.settings(tmp_path / "long", **changes, training__steps=8)).exit_code == 0
    assert run(toy.settings(tmp_path / "out", **changes, training__steps=6)).exit_code == 0
    rates = [e["learning_rate"] for e in outcome(tmp_path / "out")[0] if "loss" in e]
    assert rates == [1e-3] * 5 + [5e-4]
    longer = toy.settings(tmp_path / "out", **changes, training__steps=8)
    refused = run(longer)  # from the decay's end
    assert refused.exit_code == 1
    assert (
        "the learning rate of step 6 would have been 0.001; the run, which is at step 6, had 0.0005" in refused.output
    )
    checkpoint = tmp_path / "out" / "checkpoints" / "checkpoint-4"
    result = run(longer, "--resume", str(checkpoint))
    assert result.exit_code == 0, result.output
    same(tmp_path / "out", tmp_path / "long")


@pytest.mark.slow
def test_a_wsd_run_is_extended_from_the_end_of_its_decay_with_a_new_warm_up(toy, tmp_path):
    changes = QUICK | {"training__schedule": "wsd"}
    first = "{decay_steps: 2, decay: linear, final: 0.5}"
    settings = toy.settings(tmp_path / "out", **changes, training__steps=4, training__schedule_options=first)
    assert run(settings).exit_code == 0
    then = "{decay_steps: 2, decay: linear, final: 0.5, earlier_ends: [4], rewarm_steps: 2}"
    settings = toy.settings(tmp_path / "out", **changes, training__steps=10, training__schedule_options=then)
    result = run(settings)
    assert result.exit_code == 0, result.output
    rates = [e["learning_rate"] for e in outcome(tmp_path / "out")[0] if "loss" in e]
    expected = [1, 1, 1, 0.75, 0.5, 0.75, 1, 1, 1, 0.75]
    assert rates == pytest.approx([1e-3 * factor for factor in expected])


def test_a_schedule_that_depends_on_the_length_is_not_extended(toy, tmp_path):
    assert run(toy.settings(tmp_path / "out", **QUICK, training__steps=2)).exit_code == 0
    refused = run(toy.settings(tmp_path / "out", **QUICK, training__steps=4))
    assert refused.exit_code == 1
    assert "schedule wsd" in refused.output
