"""A data set of the Hub is what it was when it was tokenised, or begun to be read, however it changes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_kept_apart_by_its_commit(tmp_path, tokenizer):
    pytest.importorskip("datasets")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    here = Path(__file__)
    command = [sys.executable, str(here.with_name("dataset_hub.py")), str(tmp_path), str(tmp_path / "tokenizer")]
    paths = os.pathsep.join([str(here.parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found = json.loads(done.stdout.splitlines()[-1])
    first, second = found["first"], found["second"]
    assert (first["text"], second["text"]) == ("first 0", "second 0")
    assert first["store"] != second["store"]
    assert first["warned"] == second["warned"] == []
    assert found["main"] == second
    assert found["streamed"] == second
    assert found["first by its commit"] == first
    assert found["a new stream"][0].startswith("second")
    assert all(text.startswith("first") for text in found["resumed"])
    assert found["resumed"] == found["would be"]
    # Without an answer: what was downloaded last, then what was tokenised last, and never another commit than wanted.
    assert found["offline"] == second
    assert "the Hub does not give its commit 000" in found["offline, another commit"]["refused"]
    assert found["offline, first by its commit"] == first
    kept = found["offline, nothing downloaded"]
    assert (kept["text"], kept["store"]) == (second["text"], second["store"])
    assert "using what was tokenised of its commit" in kept["warned"][0]
    assert "cannot load alice/words" in found["offline, never read"]["refused"]
