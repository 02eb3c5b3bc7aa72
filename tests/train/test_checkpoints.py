"""Which checkpoint a run continues from."""

import pytest

from fat5.train.checkpoints import LAST_WRITTEN, choose, newest
from fat5.train.errors import TrainingError


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of 8, 20 and 100 steps, the last of which was never finished."""
    for steps in (8, 20, 100):
        (tmp_path / f"checkpoint-{steps}").mkdir()
    for steps in (8, 20):
        (tmp_path / f"checkpoint-{steps}" / LAST_WRITTEN).write_text("{}")
    return tmp_path


def test_auto_takes_the_newest_complete_one_by_number(folder):
    assert choose("auto", folder) == folder / "checkpoint-20"


def test_auto_starts_afresh_where_there_is_none(tmp_path):
    assert choose("auto", tmp_path / "absent") is None
    assert newest(tmp_path) is None


def test_a_path_is_taken_if_complete(folder):
    assert choose(str(folder / "checkpoint-8"), folder) == folder / "checkpoint-8"
    with pytest.raises(TrainingError, match="checkpoint-100: not a complete checkpoint"):
        choose(str(folder / "checkpoint-100"), folder)


def test_never_refuses_to_mix_two_runs(folder, tmp_path):
    with pytest.raises(TrainingError, match="checkpoint-20 is of an earlier run"):
        choose("never", folder)
    assert choose("never", tmp_path / "absent") is None
