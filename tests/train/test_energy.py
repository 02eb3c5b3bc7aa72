"""Energy is measured where codecarbon is installed, and the run does without where it is not."""

import json
import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
from toy_training import make_trainer

from fat5.train.energy import Energy


class FakeTracker:
    def __init__(self, save_to_file, log_level):
        self.calls = []

    def start(self):
        self.calls.append("start")

    def stop(self):
        assert self.calls == ["start"]
        self.final_emissions_data = SimpleNamespace(energy_consumed=0.25)


def test_what_the_tracker_measured_is_kept(tmp_path, monkeypatch):
    codecarbon = ModuleType("codecarbon")
    codecarbon.__spec__, codecarbon.EmissionsTracker = ModuleSpec("codecarbon", None), FakeTracker
    monkeypatch.setitem(sys.modules, "codecarbon", codecarbon)
    energy = Energy()
    make_trainer(tmp_path / "run", steps=1, callbacks=[energy], eval_strategy="no").train()
    assert energy.kwh == 0.25
    assert energy.fact.startswith("0.25 kWh")


def test_codecarbon_itself_measures_without_a_word(tmp_path, caplog, monkeypatch):
    pytest.importorskip("codecarbon")
    logger = logging.getLogger("codecarbon")
    logger.setLevel(logging.INFO)  # as when it has just been imported
    monkeypatch.setattr(logger, "propagate", True)
    energy = Energy()
    make_trainer(tmp_path / "run", steps=1, callbacks=[energy], eval_strategy="no").train()
    assert energy.kwh > 0
    assert [record for record in caplog.records if record.name == logger.name] == []


def test_without_codecarbon_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("fat5.train.energy.find_spec", lambda name: None)
    energy = Energy()
    make_trainer(tmp_path / "run", steps=1, callbacks=[energy], eval_strategy="no").train()
    assert energy.kwh is None
    assert energy.fact == "not measured (codecarbon is not installed)"
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])["tokens"] > 0
