"""`make quickstart` around its commands: what a signal does, and what its user is told."""

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fat5.train.signals import STOPPED

SCRIPT = Path(__file__).parents[2] / "recipes" / "quickstart.py"
# As `fat5 pretrain`: the signal that is sent to it ends it, once it has saved, which takes a while.
PROGRAM = f"""#!{sys.executable}
import os, signal, sys, time
from pathlib import Path

def save(number, frame):
    time.sleep(0.5)
    Path("saved").touch()
    sys.exit({STOPPED})

number = getattr(signal, sys.argv[1])
signal.signal(number, save)
os.kill(os.getppid(), number)
if number == signal.SIGINT:
    os.kill(os.getpid(), number)  # a terminal sends it to both
time.sleep(20)
"""


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """The script as a module, with a program of its own beside its Python."""
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "fat5").write_text(PROGRAM)
    (tmp_path / "fat5").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    return module


def test_the_models_are_compared_without_a_warning(quickstart, toy, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    difference, largest = quickstart.largest_logit_difference(toy.stock, toy.model, toy.held_out)
    assert difference < 1e-4 * largest
    assert caplog.messages == []


class SignalError(Exception):
    """What a signal comes to in the tests' process where nobody else answers it."""


def end(number: int, frame: object) -> None:
    raise SignalError


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stopped_run_has_saved_and_the_command_that_goes_on_is_told(quickstart, name, tmp_path, capsys):
    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    folder = tmp_path / "a walk"
    folder.mkdir()
    try:
        with pytest.raises(SystemExit) as stopped:
            quickstart.run(folder, "fat5", name)
        assert (folder / "saved").exists()
        with pytest.raises(SignalError):  # between the commands, signals do what they did
            os.kill(os.getpid(), getattr(signal, name))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert stopped.value.code == STOPPED
    (folder / "saved").unlink()
    told = capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "fat5").write_text("#!/bin/sh\ntouch saved\n")
    subprocess.run(told, shell=True, check=True)
    assert (folder / "saved").exists()


WAITING = f"""#!{sys.executable}
import signal, sys, time
from pathlib import Path

signal.signal(signal.SIGTERM, lambda *_: sys.exit({STOPPED}))
Path("ready").touch()
time.sleep(20)
"""


def test_a_signal_while_a_command_starts_is_passed_on(quickstart, tmp_path, monkeypatch):
    class Interrupted(subprocess.Popen):
        """Runs, but whoever started it does not know yet."""

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            while not (tmp_path / "ready").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

    (tmp_path / "fat5").write_text(WAITING)
    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(SystemExit) as stopped:
        quickstart.run(tmp_path, "fat5")
    assert stopped.value.code == STOPPED
