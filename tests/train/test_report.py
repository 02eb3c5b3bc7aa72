"""The summary and the picture of a run."""

import pytest

from fat5.train.report import describe_run, draw_losses, held_out_curves, summarise_run

LOG = [
    {"step": 0, "eval_loss": 4.0, "eval_loss_se": 0.1, "eval_S_loss": 5.0, "eval_S_loss_se": 0.2, "eval_R_loss": 3.0},
    {"step": 1, "loss": 3.9, "learning_rate": 1e-3},
    {"step": 2, "loss": 3.5, "learning_rate": 1e-3},
    {"step": 2, "eval_loss": 3.0, "eval_loss_se": 0.1, "eval_S_loss": 4.0, "eval_S_loss_se": 0.3, "eval_R_loss": 2.5},
    {"step": 2, "train_runtime": 1.0, "train_loss": 3.7},
]


def test_the_curves_are_collected_by_denoiser():
    assert held_out_curves(LOG) == {
        "": ([0, 2], [4.0, 3.0], [0.1, 0.1]),
        "R": ([0, 2], [3.0, 2.5], [0.0, 0.0]),
        "S": ([0, 2], [5.0, 4.0], [0.2, 0.3]),
    }


def test_the_table_gives_first_and_last_with_their_errors():
    lines = [line.split() for line in describe_run(LOG).splitlines()]
    assert lines[1] == ["all", "denoisers", "4.0000", "±", "0.1000", "3.0000", "±", "0.1000"]
    assert lines[2] == ["R", "3.0000", "2.5000"]
    assert describe_run(LOG[1:3]) == ""


def test_the_summary():
    summary = summarise_run(LOG)
    assert (summary["steps"], summary["last_training_loss"]) == (2, 3.5)
    assert (summary["first_evaluation"], summary["last_evaluation"]) == (LOG[0], LOG[3])
    assert summarise_run(LOG[1:3])["last_evaluation"] is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("log", [LOG, LOG[1:3]], ids=["evaluated", "not evaluated"])
def test_the_picture_is_drawn(tmp_path, log):
    draw_losses(log, tmp_path / "loss.png", "a run")
    data = (tmp_path / "loss.png").read_bytes()
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert data.startswith(b"\x89PNG")
    assert (width, height) == (1560, 576)
