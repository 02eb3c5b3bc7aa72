"""What the progress bar says while a run evaluates and trains."""

from transformers import TrainerControl, TrainerState

from fat5.train.callbacks import ProgressBar


def test_the_time_of_evaluations_is_no_steps(capsys):
    state, control, clock = TrainerState(max_steps=10, is_world_process_zero=True), TrainerControl(), [0.0]
    progress = ProgressBar()
    progress.on_train_begin(None, state, control)
    bar = progress.bar
    bar._time = lambda: clock[0]
    bar.start_t = bar.last_print_t = 0.0

    progress.on_prediction_step(None, state, control)
    assert "evaluating" in str(bar)
    clock[0] = 100.0
    progress.on_evaluate(None, state, control, metrics={"eval_loss": 2.0, "eval_loss_se": 0.1})
    assert "evaluating" not in str(bar)
    clock[0], state.global_step = 101.0, 1
    progress.on_step_end(None, state, control)

    assert (bar.n, bar.format_dict["elapsed"]) == (1, 1.0)
    progress.on_train_end(None, state, control)
    assert "step       0: held-out loss 2.0000 ± 0.1000" in capsys.readouterr().out
