"""Steps with which something is wrong: seen before the weights change, written down, and what the recipe says."""

import json
import math

import pytest
import torch
from toy_training import losses, make_trainer, toy_model
from transformers import TrainerCallback

from fat5.train.errors import TrainingError
from fat5.train.options import GuardOptions


class Spoil(TrainerCallback):
    """Multiplies the loss of some steps, by a weight of the head that is put back before the optimizer's step."""

    def __init__(self, steps, factor) -> None:
        self.steps, self.factor = steps, factor
        self.at: dict[int, dict] = {}

    def on_step_begin(self, args, state, control, model, **kwargs) -> None:
        self.at[state.global_step] = {name: p.detach().clone() for name, p in model.named_parameters()}
        if state.global_step in self.steps:
            model.lm_head.weight.data.mul_(self.factor)

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        model.lm_head.weight.data.copy_(self.at[state.global_step]["lm_head.weight"])


def spoilt(folder, steps, factor, guard, **changes):
    spoil = Spoil(steps, factor)
    trainer = make_trainer(folder, steps=8, callbacks=[], guard=guard, eval_strategy="no", save_steps=8, **changes)
    trainer.callback_handler.callbacks.insert(0, spoil)  # before the guard
    return trainer, spoil


def bad_steps(folder) -> list[dict]:
    path = folder / "bad_steps.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_bad_step_stops_the_run_and_its_examples_are_written_down(tmp_path):
    trainer, spoil = spoilt(tmp_path, [2], math.nan, GuardOptions())
    with pytest.raises(TrainingError, match=r"the loss became nan at step 3.*examples are in .*bad_steps\.jsonl"):
        trainer.train()
    [entry] = bad_steps(tmp_path)
    assert entry["examples"] == [{"batch": 2, "example": i} for i in range(16, 24)]
    assert (entry["step"], entry["loss"], entry["action"]) == (3, "nan", "stopped")
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, spoil.at[2][name]), name


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_scale"])
def test_a_skipped_step_changes_nothing_and_the_run_goes_on(tmp_path, optimizer):
    options = {"optimizer": optimizer, "weight_decay": 0.1}
    trainer, spoil = spoilt(tmp_path, [2, 5], math.inf, GuardOptions(on_bad_step="skip"), options=options)
    trainer.train()
    for name, p in spoil.at[2].items():
        assert torch.equal(p, spoil.at[3][name]), name
        assert name == "shared.weight" or not torch.equal(spoil.at[3][name], spoil.at[4][name]), name
    assert [(e["step"], e["action"]) for e in bad_steps(tmp_path)] == [(3, "skipped"), (6, "skipped")]
    assert trainer.progress.skipped == 2
    assert len(losses(trainer)) == 6  # the entries of the skipped steps have none
    assert all(map(math.isfinite, losses(trainer)))
    assert trainer.state.log_history[-2]["skipped_steps"] == 2
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    entries = [json.loads(line, parse_constant=pytest.fail) for line in lines]  # JSON that any program reads
    assert [e["step"] for e in entries if e.get("grad_norm", 0.0) is None] == [3, 6]
    state = trainer.optimizer.state[trainer.model.lm_head.weight]
    assert int(state["step"]) == 6
    assert trainer.state.global_step == 8


def test_no_more_steps_are_skipped_than_allowed(tmp_path):
    trainer, _ = spoilt(tmp_path, [1, 3, 4], math.nan, GuardOptions(on_bad_step="skip", skip_limit=2))
    with pytest.raises(TrainingError, match="2 steps were skipped already, which is guard"):
        trainer.train()
    assert [e["action"] for e in bad_steps(tmp_path)] == ["skipped", "skipped", "stopped"]


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_loss_that_leaps_is_a_bad_step_too(tmp_path, policy):
    guard = GuardOptions(on_bad_step=policy, spike=8.0, spike_window=4)
    trainer, _ = spoilt(tmp_path, [6], 60.0, guard)
    if policy == "stop":
        with pytest.raises(TrainingError, match=r"the loss leapt to \S+, from \S+ ± \S+ over 4 steps at step 7"):
            trainer.train()
    else:
        trainer.train()
    [entry] = bad_steps(tmp_path)
    assert entry["step"] == 7
    assert max(trainer.progress.recent) < entry["loss"]  # it does not raise the bar for the next


def test_without_a_spike_limit_a_leap_is_let_through(tmp_path):
    trainer, _ = spoilt(tmp_path, [6], 60.0, GuardOptions(spike_window=4))
    trainer.train()
    assert bad_steps(tmp_path) == []
    assert max(losses(trainer)) > 20


def test_what_was_skipped_before_an_interruption_counts_after_it(tmp_path):
    guard = GuardOptions(on_bad_step="skip", skip_limit=1)
    trainer, _ = spoilt(tmp_path, [1, 6], math.nan, guard)
    trainer.args.save_steps = trainer.state.save_steps = 4
    with pytest.raises(TrainingError, match="1 steps were skipped already"):
        trainer.train()
    with (tmp_path / "bad_steps.jsonl").open("a") as file:
        file.write('{"step": 8, "rea')  # killed while it was written
    resumed, _ = spoilt(tmp_path, [6], math.nan, guard)
    with pytest.raises(TrainingError, match="1 steps were skipped already"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-4"))
    # What was written down after the checkpoint is not there twice.
    assert [e["step"] for e in bad_steps(tmp_path)] == [2, 7]


def test_a_gradient_that_is_not_finite_is_caught_though_the_loss_is(tmp_path):
    model = toy_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.encoder.final_layer_norm.weight.register_hook(lambda g: g * float("inf"))
    trainer = make_trainer(tmp_path, model=model)
    with pytest.raises(TrainingError, match="a gradient became infinite or not a number, with a finite loss at step 1"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert math.isfinite(bad_steps(tmp_path)[0]["loss"])
