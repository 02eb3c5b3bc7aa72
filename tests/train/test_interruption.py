"""What a month of running meets: kills, signals, a full disk, damaged files. The runs are processes of their own."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_training import log

from fat5.train import checkpoints
from fat5.train.signals import STOPPED

HERE = Path(__file__).parent
SMOKE = str(HERE.parents[1] / "recipes" / "smoke.yaml")


class Server:
    """The process that starts runs; see run_server.py."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "run_server.py")], env=environment, text=True, **pipes
        )
        assert self.process.stdout.readline() == "ready\n"

    def run(self, settings: list[str], output: Path, interrupt=None, most_bytes=None) -> tuple[int, str]:
        """Run to the end; `interrupt` is called beside it with the run's process id."""
        arguments = ["pretrain", SMOKE, *(part for s in settings for part in ("--set", s))]
        request = {"arguments": arguments, "most_bytes": most_bytes, "output": str(output)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        number = int(self.process.stdout.readline())
        if interrupt is not None:
            thread = threading.Thread(target=interrupt, args=(number,))
            thread.start()
        answer = json.loads(self.process.stdout.readline())
        if interrupt is not None:
            thread.join()
        return answer["status"], answer["output"]


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait()


STEPS = 12


@pytest.fixture(scope="module")
def settings(toy):
    """Settings of a run into a folder: with dropout, accumulation, and a log entry that spans a checkpoint."""

    def of(out: Path, **changes) -> list[str]:
        values = {"training__steps": STEPS, "output__save_every": 3, "output__log_every": 2, "evaluation__every": 6}
        values |= {"training__optimizer": "adamw_scale", "model__dropout_rate": 0.1, "evaluation__examples": 4}
        return toy.settings(out, **(values | changes))

    return of


@pytest.fixture(scope="module")
def undisturbed(server, settings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    status, output = server.run(settings(folder / "out"), folder / "output")
    assert status == 0, output
    return folder / "out"


def same(out: Path, expected: Path) -> None:
    """The same log, to the last bit, and the same weights."""
    assert log(out) == log(expected)
    found, wanted = (load_file(folder / "model" / "model.safetensors") for folder in (out, expected))
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name
    assert not list(out.rglob(f"{checkpoints.STAGING}*"))


def kill_after(seconds: float):
    def interrupt(process: int) -> None:
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):  # done already
            os.kill(process, signal.SIGKILL)

    return interrupt


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_runs_killed_at_random_moments_end_as_the_undisturbed_one(server, settings, undisturbed, tmp_path, kills):
    draw = random.Random(kills)
    began = time.monotonic()
    server.run(settings(tmp_path / "timed"), tmp_path / "output")
    whole = time.monotonic() - began  # only to choose moments
    done = 0
    while done < kills:
        out = tmp_path / f"after{done}"
        while True:
            interrupt = kill_after(draw.uniform(0.1, 1.0) * whole) if done < kills else None
            status, output = server.run(settings(out), tmp_path / "output", interrupt)
            if status == 0:
                break
            assert status == -signal.SIGKILL, output
            done += 1
        same(out, undisturbed)


def when_logged(out: Path, number: int):
    """Send a signal to all of a run's processes, as torchrun, Slurm and a terminal do."""

    def interrupt(process: int) -> None:
        while not (out / "log.jsonl").is_file() or '"loss"' not in (out / "log.jsonl").read_text():
            time.sleep(0.01)
        os.killpg(process, number)

    return interrupt


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_stops_with_a_status_of_its_own(server, settings, undisturbed, tmp_path, number):
    out = tmp_path / "out"
    workers = settings(out, training__loader_workers=1)
    status, output = server.run(workers, tmp_path / "output", when_logged(out, number))
    assert status == STOPPED, output
    assert f"stopped by {number.name}; everything is saved in {out}/checkpoints/checkpoint-" in output
    assert "the same command continues the run" in output
    assert not (out / "model").exists()
    last = checkpoints.newest(out / "checkpoints")
    assert str(last) in output
    assert int(last.name.rsplit("-")[-1]) < STEPS
    status, output = server.run(settings(out), tmp_path / "output")
    assert status == 0, output
    same(out, undisturbed)


def test_a_full_disk_stops_the_run_and_keeps_the_last_good_checkpoint(server, settings, undisturbed, tmp_path):
    out = tmp_path / "out"
    status, output = server.run(settings(out), tmp_path / "output", when_logged(out, signal.SIGTERM))
    assert status == STOPPED, output
    [last] = (out / "checkpoints").iterdir()
    status, output = server.run(settings(out), tmp_path / "output", most_bytes=100_000)
    assert status == 1, output
    assert "could not be written" in output
    assert f"the last good one is {last}" in output
    assert "Traceback" not in output
    assert list((out / "checkpoints").iterdir()) == [last]
    status, output = server.run(settings(out), tmp_path / "output")
    assert status == 0, output
    same(out, undisturbed)


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_end_leaves_no_half_model(server, undisturbed, settings, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    shutil.rmtree(out / "model")
    status, output = server.run(settings(out), tmp_path / "output", most_bytes=100_000)
    assert status == 1, output
    assert f"the trained model could not be written to {out / 'model'}" in output
    assert not (out / "model").exists()
    assert not list(out.rglob(f"{checkpoints.STAGING}*"))
    status, output = server.run(settings(out), tmp_path / "output")
    assert status == 0, output
    same(out, undisturbed)


@pytest.mark.parametrize("damage", ["missing", pytest.param("cut short", marks=pytest.mark.slow), "garbage"])
def test_a_damaged_shard_of_the_data_is_named(server, settings, toy, undisturbed, tmp_path, damage):
    shutil.copytree(toy.cache, tmp_path / "tokens")
    for shard in (tmp_path / "tokens").glob("*/shard-00000.tokens"):
        if damage == "missing":
            shard.unlink()
        elif damage == "cut short":
            os.truncate(shard, shard.stat().st_size - 2)
        else:
            shard.write_bytes(b"\xff" * shard.stat().st_size)
    workers = 1 if damage == "garbage" else 0  # found by a process that prepares batches
    changes = {"data__cache": tmp_path / "tokens", "training__loader_workers": workers, "data__evaluation": "[]"}
    status, output = server.run(settings(tmp_path / "out", **changes), tmp_path / "output")
    assert status == 1, output
    assert "Traceback" not in output
    assert ("example" if damage == "garbage" else "shard-00000.tokens") in output
    assert "tokenise" in output
