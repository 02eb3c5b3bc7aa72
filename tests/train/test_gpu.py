"""`fat5 pretrain` on a GPU: what the fused kernels train is what a CPU trains, and an interruption leaves no trace."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_training import log

pytestmark = pytest.mark.gpu
SMOKE = str(Path(__file__).parents[2] / "recipes" / "smoke.yaml")
# Heads as wide as the attention kernels want them.
FRESH = "{d_model: 64, d_kv: 16, num_heads: 4, d_ff: 96, num_layers: 2, tie_word_embeddings: false}"


def pretrain(toy, out: Path, *more: str, **changes) -> str:
    """Run in a process of its own, on one GPU: deterministic algorithms are a whole process's affair."""
    values = {"model__fresh": FRESH, "training__optimizer": "adamw_scale", "training__device": "auto"}
    values |= {"training__steps": 4, "evaluation__samples": 0, "evaluation__every": 2}
    settings = toy.settings(out, **(values | changes))
    command = [sys.executable, "-m", "fat5.cli", "pretrain", SMOKE, *more, *(p for s in settings for p in ("--set", s))]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


@pytest.mark.parametrize("packing", ["none", "segments", "stream"])
def test_it_trains_as_a_cpu_does(toy, tmp_path, packing):
    for device in ("auto", "cpu"):
        pretrain(toy, tmp_path / device, training__device=device, data__packing=packing, model__dropout_rate=0.0)
    for entry, expected in zip(log(tmp_path / "auto"), log(tmp_path / "cpu"), strict=True):
        assert entry == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("precision", "packing"),
    [("bf16", "none"), ("bf16", "stream"), ("bf16_kahan", "stream"), ("bf16_stochastic", "none")],
)
def test_a_deterministic_run_resumes_bit_by_bit(toy, tmp_path, precision, packing):
    changes = {"training__precision": precision, "data__packing": packing, "training__deterministic": "true"}
    changes["model__dropout_rate"] = 0.1
    whole, out = tmp_path / "whole", tmp_path / "out"
    pretrain(toy, whole, **changes)
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "checkpoint-4")
    pretrain(toy, out, **changes)
    assert log(out) == log(whole)
    found, expected = (load_file(folder / "model" / "model.safetensors") for folder in (out, whole))
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_the_memory_is_told_before_and_while_it_runs(toy, tmp_path):
    assert "at the peak without the optimizer" in pretrain(toy, tmp_path / "out", "--dry-run")
    pretrain(toy, tmp_path / "out")
    entries = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    memory = [e["peak_memory_gib"] for e in entries if "loss" in e]
    assert 0 < memory[0] <= memory[-1] < 1
