"""The trainer on toy data: exact losses, exact resumption, and what stops it."""

import json

import pytest
import torch
from torch.nn import functional as F
from toy_training import Gradients, ToyBatches, ToyWindows, losses, make_trainer, toy_collator, toy_model
from transformers import TrainerCallback

from fat5.train.errors import TrainingError
from fat5.train.throughput import CLOCKED
from fat5.train.trainer import PretrainingTrainer


def curve(trainer: PretrainingTrainer) -> list[dict]:
    return without_clock(trainer.state.log_history)


def without_clock(entries) -> list[dict]:
    return [{k: v for k, v in e.items() if k not in CLOCKED} for e in entries if "train_runtime" not in e]


@pytest.mark.parametrize("micro", [8, 4, 2, 1])
def test_a_step_is_the_mean_over_its_targets_however_it_is_split(tmp_path, micro):
    gradients = Gradients()
    trainer = make_trainer(tmp_path, steps=1, micro=micro, callbacks=[gradients], max_grad_norm=0.0)
    oracle = toy_model()
    batch = ToyBatches(20, 8, 1)[0]
    logits = oracle(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())  # torch's own mean over what is not -100
    loss.backward()
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-6)
    expected = {name: p.grad for name, p in oracle.named_parameters() if p.grad is not None}
    assert gradients.kept.keys() == expected.keys()
    for name, gradient in expected.items():
        worst = (gradients.kept[name] - gradient).abs().max() / gradient.abs().max()
        assert worst < 1e-5, name


def test_accumulation_gives_the_same_weights(tmp_path):
    # A large epsilon, so that Adam does not blow rounding in a near-zero gradient up to a whole step.
    whole, split = (make_trainer(tmp_path / str(micro), steps=4, micro=micro, adam_epsilon=1e-2) for micro in (8, 2))
    whole.train()
    split.train()
    assert losses(split) == pytest.approx(losses(whole), rel=1e-5)
    for (name, a), b in zip(whole.model.named_parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


class Interrupt(TrainerCallback):
    """Breaks a run off in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("broken_at", "checkpoint"), [(3, 2), *(pytest.param(n, n - 1, marks=pytest.mark.slow) for n in (5, 7))]
)
def test_an_interrupted_run_is_bit_by_bit_the_undisturbed_one(tmp_path, broken_at, checkpoint):
    """With dropout, accumulation, evaluation in between and the second epoch's start (after 2.5 steps) on the way."""

    def trainer(name, *callbacks):
        model = toy_model(dropout_rate=0.2)
        return make_trainer(tmp_path / name, steps=8, micro=4, model=model, callbacks=callbacks)

    undisturbed = trainer("undisturbed")
    undisturbed.train()
    with pytest.raises(KeyboardInterrupt):
        trainer("broken", Interrupt(broken_at)).train()
    torch.manual_seed(99)  # the state of the process that resumes must not matter
    resumed = trainer("broken")
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoints" / f"checkpoint-{checkpoint}"))
    assert curve(resumed) == curve(undisturbed)
    for (name, a), b in zip(undisturbed.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    logs = [
        without_clock(map(json.loads, (tmp_path / name / "log.jsonl").open())) for name in ("undisturbed", "broken")
    ]
    assert logs[0] == logs[1] == curve(undisturbed)


def test_the_loss_falls(tmp_path):
    trainer = make_trainer(tmp_path, steps=60, eval_steps=20, save_steps=60, learning_rate=1e-2, eval_on_start=True)
    trainer.train()
    held_out = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert len(held_out) == 4
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5
    assert held_out[-1] < held_out[0]


def test_held_out_figures_are_those_of_each_denoisers_targets(tmp_path):
    trainer = make_trainer(tmp_path)
    figures = trainer.evaluate()
    windows, model = ToyWindows(13, seed=9), toy_model().eval()
    sums = {0: [0.0, 0], 1: [0.0, 0]}
    for i in range(13):
        batch = toy_collator([windows[i]])
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], labels=batch["labels"]).logits
        sums[i % 2][0] += F.cross_entropy(logits[0], batch["labels"][0], reduction="sum").item()
        sums[i % 2][1] += batch["labels"].numel()
    (copy, n_copy), (back, n_back) = sums[0], sums[1]
    assert figures["eval_copy_loss"] == pytest.approx(copy / n_copy, rel=1e-5)
    assert figures["eval_reverse_loss"] == pytest.approx(back / n_back, rel=1e-5)
    assert figures["eval_loss"] == pytest.approx((copy + back) / (n_copy + n_back), rel=1e-5)
    assert 0 < figures["eval_loss_se"] < 0.5
    assert trainer.evaluate() == figures  # the same examples, the same masks


def test_evaluating_does_not_change_the_run(tmp_path):
    """Dropout draws from the stream that a careless evaluation would draw from too."""
    curves = []
    for when in ("steps", "no"):
        trainer = make_trainer(tmp_path / when, model=toy_model(dropout_rate=0.2), eval_strategy=when, eval_steps=1)
        trainer.train()
        curves.append(losses(trainer))
    assert curves[0] == curves[1]


def test_norms_and_position_biases_are_not_decayed(tmp_path):
    trainer = make_trainer(tmp_path, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in trainer.model.named_parameters():
        free = "layer_norm" in name or "relative_attention_bias" in name
        assert decay[id(p)] == (0.0 if free else 0.1), name


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_change(tmp_path):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs) -> None:
            if state.global_step == 2:
                self.before = {name: p.clone() for name, p in model.named_parameters()}
                model.lm_head.weight.data[7] = float("nan")

    spoil = Spoil()
    trainer = make_trainer(tmp_path, callbacks=[spoil])
    with pytest.raises(TrainingError, match=r"the loss became nan at step 3 \(learning rate 0\.002\).*Lower"):
        trainer.train()
    for name, p in trainer.model.named_parameters():
        if name != "lm_head.weight":
            assert torch.equal(p, spoil.before[name]), name


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_change(tmp_path):
    model = toy_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.encoder.final_layer_norm.weight.register_hook(lambda g: g * float("inf"))
    trainer = make_trainer(tmp_path, model=model)
    with pytest.raises(
        TrainingError, match=r"a gradient became infinite or not a number, with a finite loss at step 1"
    ):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_checkpoint_is_a_complete_repo_with_the_configuration_it_came_with(tmp_path):
    model = toy_model(use_cache=True)
    make_trainer(tmp_path, steps=2, model=model).train()
    saved = tmp_path / "checkpoints" / "checkpoint-2"
    config = json.loads((saved / "config.json").read_text())
    assert config["use_cache"] is True
    assert "AutoModelForSeq2SeqLM" in config["auto_map"]
    for name in ("modeling_flash_t5.py", "model.safetensors", "generation_config.json", "tokenizer.json"):
        assert (saved / name).is_file(), name
