"""Which checkpoint a run continues from."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fat5.train.checkpoints import MARKER, STAGING, choose, defect, newest, rotate, seal
from fat5.train.errors import TrainingError


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of 8, 20 and 100 steps, the last of which was never finished."""
    for steps in (8, 20, 100):
        write(tmp_path / STAGING)
        seal(tmp_path / STAGING, tmp_path / f"checkpoint-{steps}")
    (tmp_path / "checkpoint-100" / MARKER).unlink()
    return tmp_path


def write(path, text="weights"):
    (path / "sharded").mkdir(parents=True)
    (path / "weights").write_text(text)
    (path / "sharded" / "0.distcp").write_text("state")


def test_auto_takes_the_newest_complete_one_by_number(folder):
    assert choose("auto", folder) == folder / "checkpoint-20"


def test_auto_starts_afresh_where_there_is_none(tmp_path):
    assert choose("auto", tmp_path / "absent") is None
    assert newest(tmp_path) is None


def test_auto_does_not_start_afresh_where_all_are_damaged(folder):
    for steps in (8, 20):
        (folder / f"checkpoint-{steps}" / "weights").unlink()
    with pytest.raises(TrainingError, match=r"no checkpoint in .* is whole; bring one back, or delete them"):
        choose("auto", folder)


def test_a_path_is_taken_if_complete(folder):
    assert choose(str(folder / "checkpoint-8"), folder) == folder / "checkpoint-8"
    with pytest.raises(TrainingError, match="checkpoint-100: not a complete checkpoint"):
        choose(str(folder / "checkpoint-100"), folder)


def test_never_refuses_to_mix_two_runs(folder, tmp_path):
    with pytest.raises(TrainingError, match="checkpoint-20 is of an earlier run"):
        choose("never", folder)
    assert choose("never", tmp_path / "absent") is None


def test_a_sealed_folder_has_its_name_and_nothing_else_is_left(tmp_path):
    write(tmp_path / STAGING)
    seal(tmp_path / STAGING, tmp_path / "checkpoint-8")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-8"]
    assert json.loads((tmp_path / "checkpoint-8" / MARKER).read_text())["files"] == {
        "sharded/0.distcp": 5,
        "weights": 7,
    }
    write(tmp_path / STAGING, "other weights")  # the run came by there again
    seal(tmp_path / STAGING, tmp_path / "checkpoint-8")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-8"]
    assert (tmp_path / "checkpoint-8" / "weights").read_text() == "other weights"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "weights").write_text("weigh"), "weights has 5 bytes where 7 were written"),
        (lambda f: (f / "sharded" / "0.distcp").unlink(), "sharded/0.distcp is missing"),
        (lambda f: (f / MARKER).write_text('{"files": {"mod'), f"{MARKER} is damaged"),
    ],
)
def test_a_damaged_one_is_told_of_and_passed_over(folder, capsys, damage, message):
    damage(folder / "checkpoint-20")
    assert defect(folder / "checkpoint-20") == message
    assert newest(folder) == folder / "checkpoint-8"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors", "optimizer.pt", "rng_state_0.pth"])
def test_other_bytes_than_were_written_are_told_by_the_form_of_a_file(folder, name):
    write(folder / STAGING)
    path = folder / STAGING / name
    if name.endswith(".json"):
        path.write_text('{"step": 3}')
    elif name.endswith(".safetensors"):
        save_file({"a": torch.ones(3)}, path)
    else:
        torch.save({"a": torch.ones(3)}, path)
    seal(folder / STAGING, folder / "checkpoint-20")
    assert defect(folder / "checkpoint-20") is None
    (folder / "checkpoint-20" / name).write_bytes(b"?" * (folder / "checkpoint-20" / name).stat().st_size)
    assert defect(folder / "checkpoint-20") == f"{name} is damaged"
    assert newest(folder) == folder / "checkpoint-8"


def test_the_oldest_go_first(folder):
    rotate(folder, 2)
    assert {p.name for p in folder.iterdir()} == {"checkpoint-20", "checkpoint-100"}
