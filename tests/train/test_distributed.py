"""DDP and FSDP2, as two processes: the same steps, checkpoints for any number of processes, a whole repo.

With gloo on a CPU and, where there are two, with NCCL on GPUs; one process, on a CPU, says what is right.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils.data import DataLoader
from toy_training import SCALED, Gradients, ToyBatches, losses, make_trainer, toy_model
from transformers import AutoModelForSeq2SeqLM

from fat5.model.runtime_files import RUNTIME_FILES
from fat5.train.data import load_data
from fat5.train.held_out import measure, summarise
from fat5.train.load import load_model, load_tokenizer
from fat5.train.recipe import load_recipe
from fat5.train.sharding import FOLDER, shard, whole_weights

HERE = Path(__file__).parent
SMOKE = HERE.parents[1] / "recipes" / "smoke.yaml"


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A group of this one process, which sharding needs."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def alone(folder, *, sharded=False, resume=None, **changes):
    """Run in this process."""
    model = toy_model()
    if sharded:
        shard(model, torch.device("cpu"))
    trainer = make_trainer(folder, micro=4, model=model, options=SCALED, eval_strategy="no", **changes)
    trainer.train(resume_from_checkpoint=resume)
    return whole_weights(trainer.model) if sharded else trainer.model.state_dict()


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def two(request, toy, tmp_path_factory, group) -> Path:
    """What two processes leave; see two_processes.py."""
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    folder = tmp_path_factory.mktemp("two")
    for name in ("ddp", "fsdp"):
        alone(folder / f"{name}_one", sharded=name == "fsdp", save_total_limit=9)
    changes = {"training__parallel": "fsdp", "training__optimizer": "adamw_scale"}
    changes["training__device"] = "cpu" if request.param == "cpu" else "auto"
    settings = toy.settings(folder / "run", **changes)
    (folder / "settings.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(HERE / "two_processes.py"), str(folder), str(SMOKE)]
    paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "TOY_DEVICE": request.param}
    done = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


def left(two: Path, name: str, rank: int = 0):
    return torch.load(two / f"{name}-{rank}.pt", weights_only=False)


@pytest.mark.parametrize("how", ["one of 64", "four of 16", "two processes", "two processes, sharded"])
def test_a_step_is_the_mean_over_its_real_targets_however_it_is_split(two, tmp_path, how):
    """Against torch's own mean over what is not -100, of one batch of 64."""
    oracle = toy_model()
    batch = ToyBatches(64, 64, 1)[0]
    logits = oracle(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    expected.backward()
    if how.startswith("two"):
        loss, found = left(two, f"step{'sharded' in how}")
    else:
        gradients = Gradients()
        micro = 64 if how == "one of 64" else 16
        trainer = make_trainer(tmp_path, steps=1, batch=64, micro=micro, n=64, callbacks=[gradients], max_grad_norm=0.0)
        trainer.train()
        loss, found = losses(trainer)[0], gradients.kept
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    named = {name: p.grad for name, p in oracle.named_parameters() if p.grad is not None}
    assert found.keys() == named.keys()
    for name, gradient in named.items():
        assert (found[name] - gradient).abs().max() < 1e-5 * gradient.abs().max(), name


def close(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_train_as_one(two, tmp_path, name):
    """With an optimizer that looks at whole parameters."""
    undisturbed = alone(tmp_path)
    moved = max((undisturbed[key] - p).abs().max() for key, p in toy_model().state_dict().items())
    assert moved > 1e-3
    close(left(two, name), undisturbed)


@pytest.mark.parametrize("name", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_a_checkpoint_serves_another_number_of_processes(two, tmp_path, name):
    undisturbed = alone(tmp_path / "undisturbed")
    close(left(two, f"{name}_one"), undisturbed)  # begun by one, continued by two
    checkpoint = two / name / "checkpoints" / "checkpoint-2"
    assert (checkpoint / FOLDER).is_dir() == (name == "fsdp")
    close(alone(tmp_path / "resumed", sharded=name == "fsdp", resume=str(checkpoint)), undisturbed)


def test_a_signal_to_one_process_stops_all_with_one_checkpoint(two):
    stopped = [left(two, "killed", rank) for rank in (0, 1)]
    assert stopped == [("a signal to another process", 3), ("SIGTERM", 3)]
    assert [p.name for p in (two / "killed" / "checkpoints").iterdir()] == ["checkpoint-3"]


def test_a_bad_step_of_one_process_is_skipped_by_all(two):
    (skipped, first), (also, second) = (left(two, "spoilt", rank) for rank in (0, 1))
    assert skipped == also == 1
    for name in first:
        assert torch.equal(first[name], second[name]), name
        assert first[name].isfinite().all(), name
    [entry] = map(json.loads, (two / "spoilt" / "bad_steps.jsonl").open())
    assert (entry["step"], entry["action"]) == (3, "skipped")


def test_processes_that_see_different_checkpoints_do_not_start(two):
    for rank in (0, 1):
        assert "see different checkpoints in" in left(two, "disagree", rank)
        assert "(none, checkpoint-1, by rank)" in left(two, "disagree", rank)


def test_two_processes_measure_what_one_does_on_held_out_text(two, toy):
    """Twelve examples in batches of five: the last ones do not divide among two."""
    recipe = load_recipe(SMOKE, json.loads((two / "settings.json").read_text()))
    model = load_model(recipe.model).eval()
    data = load_data(recipe, load_tokenizer(recipe.model, model.config), model.config.vocab_size, 2)
    loader = DataLoader(data.held_out, 1, collate_fn=data.held_out_collator)
    examples = measure(lambda batch: model(input_ids=batch["input_ids"], labels=batch["labels"]).logits, loader)
    assert len(examples.losses) == 12
    expected = summarise(examples, data.denoisers, "eval")
    logged = json.loads((two / "run" / "log.jsonl").read_text().splitlines()[0])
    assert logged == pytest.approx(expected | {"step": 0}, rel=1e-5)


def test_the_repo_of_a_sharded_run_is_whole_and_exports(two, toy, tmp_path):
    repo = two / "run" / "model"
    assert {p.name for p in repo.glob("*.py")} == set(RUNTIME_FILES)
    config = json.loads((repo / "config.json").read_text())
    assert config["auto_map"]["AutoModelForSeq2SeqLM"] == "modeling_flash_t5.FlashT5ForConditionalGeneration"
    assert config["architectures"] == ["FlashT5ForConditionalGeneration"]
    from fat5convert.cli import main as fat5convert

    result = CliRunner().invoke(fat5convert, ["export", str(repo), str(tmp_path / "stock")])
    assert result.exit_code == 0, result.output
    stock = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "stock").eval()
    trained = AutoModelForSeq2SeqLM.from_pretrained(repo, trust_remote_code=True).eval()
    ids = torch.arange(3, 18).view(3, 5)
    logits = [model(input_ids=ids, decoder_input_ids=ids).logits for model in (stock, trained)]
    assert (logits[0] - logits[1]).abs().max() < 1e-4 * logits[0].abs().max()
    before = AutoModelForSeq2SeqLM.from_pretrained(toy.model, trust_remote_code=True).eval()
    assert (before(input_ids=ids, decoder_input_ids=ids).logits - logits[1]).abs().max() > 1e-3
    assert load_recipe(two / "run" / "recipe.yaml").training.parallel == "fsdp"


def test_sharded_bf16_weights_resume_bit_by_bit(group, tmp_path):
    """The moments in fp32 and the compensations among what a sharded checkpoint holds."""

    def run(resume=None):
        model = toy_model(dropout_rate=0.1).bfloat16()
        shard(model, torch.device("cpu"))
        options = SCALED | {"precision": "bf16_kahan"}
        trainer = make_trainer(tmp_path / str(resume), steps=4, model=model, options=options, eval_strategy="no")
        trainer.train(resume_from_checkpoint=resume)
        state = trainer.optimizer.optimizer.state[trainer.model.shared.weight]
        return whole_weights(trainer.model), {name: s.full_tensor() for name, s in state.items() if name != "step"}

    weights, state = run()
    resumed, its_state = run(str(tmp_path / "None" / "checkpoints" / "checkpoint-2"))
    dtypes = {name: tensor.dtype for name, tensor in its_state.items()}
    assert dtypes == {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "compensation": torch.bfloat16}
    for expected, found in ((weights, resumed), (state, its_state)):
        assert expected.keys() == found.keys()
        for name in expected:
            assert torch.equal(expected[name], found[name]), name
