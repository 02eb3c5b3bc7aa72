"""A run on two machines: two of torchrun's agents that know each other by address only, here both on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_training import log

SMOKE = str(Path(__file__).parents[2] / "recipes" / "smoke.yaml")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def pretrain(settings: list[str], machines: int) -> list[subprocess.CompletedProcess]:
    """Run `fat5 pretrain` with one process on each of so many machines."""
    port = free_port()
    arguments = ["-m", "fat5.cli", "pretrain", SMOKE, *(part for setting in settings for part in ("--set", setting))]
    place = ["-m", "torch.distributed.run", "--nnodes", str(machines), "--nproc-per-node", "1"]
    place += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    commands = [[sys.executable, *arguments]]
    if machines > 1:
        commands = [[sys.executable, *place, "--node-rank", str(rank), *arguments] for rank in range(machines)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [subprocess.Popen(c, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options) for c in commands]
    outputs = [process.communicate(timeout=600)[0] for process in running]
    assert [process.returncode for process in running] == [0] * machines, "\n".join(outputs)[-6000:]
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_machines_train_as_one_does(toy, tmp_path, parallel):
    changes = {"training__steps": 4, "training__batch_size": 8, "evaluation__samples": 0}
    changes |= {"model__dropout_rate": 0.0, "training__optimizer": "adamw_scale"}  # dropout draws by process
    pretrain(toy.settings(tmp_path / "one", **changes), 1)
    changes["training__parallel"] = parallel
    first, second = pretrain(toy.settings(tmp_path / "two", **changes), 2)
    assert "model: " in first
    assert "model: " not in second, "one process speaks"
    for entry, expected in zip(log(tmp_path / "two"), log(tmp_path / "one"), strict=True):
        assert entry == pytest.approx(expected, rel=1e-4)
    found, expected = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("two", "one"))
    before = load_file(toy.model / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=2e-6, msg=name)
    assert any((before[name] - found[name]).abs().max() > 1e-3 for name in found)
