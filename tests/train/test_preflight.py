"""`fat5 pretrain --dry-run`: what it says of a run in order, and what it finds."""

import os
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from fat5.cli import main

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"


def dry_run(settings: list[str]):
    arguments = [part for setting in settings for part in ("--set", setting)]
    return CliRunner().invoke(main, ["pretrain", str(SMOKE), "--dry-run", *arguments])


def test_a_run_in_order_is_described_and_nothing_is_written(toy, tmp_path):
    optimizer = {"training__optimizer": "adamw_scale", "training__precision": "bf16_kahan"}
    result = dry_run(toy.settings(tmp_path / "out", **optimizer, data__cache=tmp_path / "cache"))
    assert result.exit_code == 0, result.output
    parameters = sum(p.numel() for p in load_file(toy.model / "model.safetensors").values())
    assert f"model: {parameters:,} parameters, 64 embedding rows, bf16_kahan" in result.output
    assert f"data: {toy.train}, {toy.held_out}: there" in result.output
    assert re.search(r"tokenizer: 38 ids for 64 rows, 20 sentinels \(37 to 18\), mode tokens: \[R\] \d+", result.output)
    assert "14 bytes a parameter" in result.output
    assert re.search(r"longest of 4 batches \(\d+ real of \d+ tokens\).*: loss \d\.\d+, gradient norm", result.output)
    for denoiser in ("[R] span mu=3 r=0.15", "[S] prefix", "[X] span mu=64 r=0.5"):
        assert denoiser in result.output
    assert result.output.count("  input   ") == result.output.count("  target  ") == 7
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("packing", ["segments", "stream"])
def test_packed_batches_are_tried_as_well(toy, tmp_path, packing):
    result = dry_run(toy.settings(tmp_path / "out", data__packing=packing))
    assert result.exit_code == 0, result.output
    assert re.search(r"longest of 4 batches \(\d+ real of \d+ tokens\).*: loss \d\.\d+", result.output)


Usage = namedtuple("Usage", "total used free")


def full_disk(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 9 * 10**5, 10**5))


def little_memory(monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 100)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(full_disk, "output.keep_checkpoints"), (little_memory, "training.precision=bf16_kahan")],
)
def test_too_little_of_disk_or_memory_is_found(toy, tmp_path, monkeypatch, spoil, message):
    spoil(monkeypatch)
    result = dry_run(toy.settings(tmp_path / "out"))
    assert result.exit_code == 1
    assert message in result.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__train": "[{files: [absent-*.txt]}]"}, "no file matches absent-*.txt"),
        ({"data__sentinels": "mt5"}, "too few for the sentinels of mt5"),
        ({"training__batch_size": 6, "training__micro_batch_size": 4}, "batch_size 6 must be a multiple"),
        ({"training__schedule": "wsd"}, "training.schedule_options do not fit schedule wsd"),
        ({"training__optimizer": "adamw_8bit"}, "training.optimizer adamw_8bit: "),
        ({"training__parallel": "fsdp"}, ""),
    ],
)
def test_what_cannot_start_is_found(toy, tmp_path, changes, message):
    result = dry_run(toy.settings(tmp_path / "out", **changes))
    assert result.exit_code == (1 if message else 0), result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("parallel", "each"), [("ddp", 12), ("fsdp", 16)])
def test_the_size_of_a_checkpoint_is_foretold(toy, tmp_path, parallel, each):
    """fp32 weights and AdamW's two moments and, of a sharded run, the weights as a whole too."""
    fresh = "{d_model: 128, d_kv: 16, num_layers: 2}"
    result = dry_run(toy.settings(tmp_path / "out", model__fresh=fresh, training__parallel=parallel))
    parameters = int(re.search(r"model: ([\d,]+) parameters", result.output)[1].replace(",", ""))
    foretold = float(re.search(r"disk: ([\d.]+) MiB a checkpoint", result.output)[1])
    assert foretold == pytest.approx(parameters * each / 2**20, abs=0.06)


def test_a_tokenizer_of_more_ids_than_the_model_has_rows_is_found(toy, tmp_path):
    shutil.copytree(toy.model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(toy.stock)
    tokenizer.add_tokens([f"word{n}" for n in range(27)])
    tokenizer.save_pretrained(tmp_path / "model")
    result = dry_run(toy.settings(tmp_path / "out", model__path=tmp_path / "model"))
    assert result.exit_code == 1
    assert (
        f"the tokenizer in model.path {tmp_path / 'model'} has 65 ids, and the model 64 embedding rows" in result.output
    )


def test_a_missing_tokenizer_is_found(toy, tmp_path):
    shutil.copytree(toy.model, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*", "spiece*"))
    result = dry_run(toy.settings(tmp_path / "out", model__path=tmp_path / "model"))
    assert result.exit_code == 1
    assert f"model.path {tmp_path / 'model'} has no tokenizer" in result.output


def test_damaged_weights_are_found(toy, tmp_path):
    shutil.copytree(toy.model, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["lm_head.weight"][3] = torch.nan
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    result = dry_run(toy.settings(tmp_path / "out", model__path=tmp_path / "model"))
    assert result.exit_code == 1
    assert "the model or its data is damaged" in result.output
