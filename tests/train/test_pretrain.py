"""`fat5 pretrain` from the command line to the repo that it leaves."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch.nn import functional as F
from toy_training import log
from transformers import AutoModelForSeq2SeqLM

from fat5.cli import COMMANDS, main
from fat5.model import FlashT5ForConditionalGeneration
from fat5.train.continuation import Claim
from fat5.train.data import load_data
from fat5.train.folder import RunFolder
from fat5.train.load import add_rows, load_tokenizer
from fat5.train.recipe import load_recipe
from fat5.train.run import pretrain
from fat5.train.trainer import PretrainingTrainer

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"


def run(settings: list[str], *more: str, recipe: Path = SMOKE):
    arguments = [part for setting in settings for part in ("--set", setting)]
    return CliRunner().invoke(main, ["pretrain", str(recipe), *arguments, *more])


def test_what_a_run_leaves(toy, tmp_path):
    result = run(toy.settings(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert "all denoisers" in result.output
    out = tmp_path / "out"
    files = {
        ".lock",
        "recipe.yaml",
        "corpora.json",
        "log.jsonl",
        "loss.png",
        "report.html",
        "samples.json",
        "checkpoints",
        "model",
    }
    assert {p.name for p in out.iterdir()} == files
    samples = json.loads((out / "samples.json").read_text())
    assert [s["denoiser"] for s in samples["before"]] == [s["denoiser"] for s in samples["after"]]
    assert all(s[key] for s in samples["before"] for key in ("denoiser", "input", "target"))
    assert f"<h1>Pretraining: {out.name}</h1>" in (out / "report.html").read_text()
    assert load_recipe(out / "recipe.yaml").training.steps == 2
    entries = log(out)
    assert [e["step"] for e in entries if "loss" in e] == [1, 2]
    assert [e["step"] for e in entries if "eval_loss" in e] == [0, 1, 2]
    *_, end = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    assert "train_runtime" in end
    assert "train_loss" not in end  # which would be another number after an interruption
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "model" / "training.json").read_text())
    assert summary["last_evaluation"]["eval_loss"] == entries[-1]["eval_loss"]


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory) -> Path:
    """A run of 8 steps in which the loss falls, with all its checkpoints; the 30 lines are gone through in between."""
    out = tmp_path_factory.mktemp("trained") / "out"
    settings = toy.settings(
        out,
        training__steps=8,
        training__batch_size=8,
        training__learning_rate=3e-3,
        evaluation__every=3,
        output__keep_checkpoints=9,
    )
    result = run(settings)
    assert result.exit_code == 0, result.output
    return out


def test_the_trained_repo_keeps_the_dropout_of_the_model(toy, tmp_path, monkeypatch):
    """Though what it was loaded from is no longer there at the end."""
    out, model = tmp_path / "out", tmp_path / "model"
    shutil.copytree(toy.model, model)
    train = PretrainingTrainer.train

    def and_remove(self, *args, **kwargs):
        shutil.rmtree(model)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(PretrainingTrainer, "train", and_remove)
    result = run(toy.settings(out, model__path=model, model__dropout_rate=0.4, evaluation__samples=0))
    assert result.exit_code == 0, result.output
    own = json.loads((toy.model / "config.json").read_text())["dropout_rate"]
    assert own != 0.4
    assert json.loads((out / "model" / "config.json").read_text())["dropout_rate"] == own


def test_the_loss_falls(trained):
    figures = [e for e in log(trained) if "eval_loss" in e]
    first, last = figures[0], figures[-1]
    assert last["eval_loss"] < first["eval_loss"] - 5 * first["eval_loss_se"]


@pytest.mark.parametrize("how", ["auto", "path"])
def test_a_resumed_run_is_bit_by_bit_the_undisturbed_one(trained, tmp_path, how):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    shutil.rmtree(out / "model")
    if how == "auto":  # as if killed after step 5: the newest complete checkpoint is that of step 4
        shutil.rmtree(out / "checkpoints" / "checkpoint-8")
        (out / "checkpoints" / "checkpoint-6" / "trainer_state.json").unlink()
    checkpoint = "auto" if how == "auto" else str(out / "checkpoints" / "checkpoint-2")
    result = CliRunner().invoke(
        main, ["pretrain", str(out / "recipe.yaml"), "--set", f"output.folder={out}", "--resume", checkpoint]
    )
    assert result.exit_code == 0, result.output
    assert log(out) == log(trained)
    weights, expected = (load_file(folder / "model" / "model.safetensors") for folder in (out, trained))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "change", ["loader_workers=2", pytest.param("gradient_checkpointing=true", marks=pytest.mark.slow)]
)
def test_what_only_changes_speed_does_not_change_the_run(trained, tmp_path, change):
    out = tmp_path / "out"
    changes = ["--set", f"output.folder={out}", "--set", f"training.{change}"]
    result = CliRunner().invoke(main, ["pretrain", str(trained / "recipe.yaml"), *changes])
    assert result.exit_code == 0, result.output
    for entry, expected in zip(log(out), log(trained), strict=True):
        assert entry == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow  # test_distributed.py and test_trainer.py split steps too
def test_the_split_into_forward_passes_does_not_change_the_run(toy, tmp_path):
    """The same examples, in the same steps; without dropout, which draws anew for each forward pass."""
    logs = []
    for micro in (1, 4):
        out = tmp_path / str(micro)
        result = run(toy.settings(out, training__micro_batch_size=micro, training__steps=4, model__dropout_rate=0.0))
        assert result.exit_code == 0, result.output
        logs.append(log(out))
    for entry, expected in zip(*logs, strict=True):
        assert entry == pytest.approx(expected, rel=1e-4)


def test_an_output_folder_that_cannot_be_made_is_named(toy, tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = run(toy.settings(tmp_path / "file" / "out"))
    assert result.exit_code == 1
    assert str(tmp_path / "file" / "out") in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("packing", [pytest.param("segments", marks=pytest.mark.slow), "stream"])
def test_packed_batches_are_trained_on(toy, tmp_path, packing):
    changes = {"training__steps": 6, "training__learning_rate": 3e-3, "output__save_every": 6}
    result = run(toy.settings(tmp_path / "out", data__packing=packing, **changes))
    assert result.exit_code == 0, result.output
    figures = [e["eval_loss"] for e in log(tmp_path / "out") if "eval_loss" in e]
    assert figures[-1] < figures[0] - 0.1


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_another_recipe_does_not_continue_a_run(trained, more):
    result = CliRunner().invoke(main, ["pretrain", str(trained / "recipe.yaml"), "--set", "training.seed=1", *more])
    assert result.exit_code == 1
    assert "holds a run of another recipe (training.seed: 0 -> 1)" in result.output


def test_other_text_does_not_continue_a_run(toy, tmp_path):
    """Neither more of it nor another word; but the same, written anew, does."""
    path, text = tmp_path / "train.txt", toy.train.read_text()
    path.write_text(text)
    changes = {"data__train": f"[{{files: ['{path}'], documents: line}}]", "output__save_every": 1}
    settings = toy.settings(tmp_path / "out", **changes)
    assert run(settings).exit_code == 0
    again = ("--resume", str(tmp_path / "out" / "checkpoints" / "checkpoint-1"))
    word, *rest = text.split(" ")
    for other in (text + text, " ".join(["cat" if word != "cat" else "dog", *rest])):
        path.write_text(other)
        result = run(settings, *again)
        assert result.exit_code == 1
        assert f"the text of {path} is not what it was when the run" in " ".join(result.output.split())
    path.write_text(text)
    result = run(settings, *again)
    assert result.exit_code == 0, result.output


def test_two_runs_do_not_write_to_one_folder(toy, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code, str(out / ".lock")], stdin=-1, stdout=-1, text=True)
    other.stdout.readline()
    result = run(toy.settings(out, evaluation__samples=0))
    assert result.exit_code == 1
    assert f"another run is writing to {out}; wait for its end" in result.output
    assert not (out / "recipe.yaml").exists()
    other.kill()
    other.communicate()
    with Claim(RunFolder(out)):
        pass


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fat5.train.continuation.fcntl.lockf", refuse)
    with pytest.warns(UserWarning, match="is on a file system without locks"), Claim(RunFolder(tmp_path)):
        pass


def test_never_resuming_does_not_mix_runs(trained):
    result = CliRunner().invoke(main, ["pretrain", str(trained / "recipe.yaml"), "--resume", "never"])
    assert result.exit_code == 1
    assert "is of an earlier run" in result.output


def test_the_held_out_figures_are_those_of_the_model_on_fixed_masks(toy, tmp_path):
    """Without learning, every evaluation, under any training seed, is the sum over single examples done by hand."""
    settings = toy.settings(tmp_path / "out", training__learning_rate=1e-30, training__seed=3)
    recipe = load_recipe(SMOKE, settings)
    figures = [e for e in pretrain(recipe) if "eval_loss" in e]
    model = FlashT5ForConditionalGeneration.from_pretrained(toy.model, dtype=torch.float32).eval()
    data = load_data(recipe, load_tokenizer(recipe.model, model.config), model.config.vocab_size, 2)
    sums: dict[str, list[float]] = {}
    for i in range(12):
        batch = data.held_out_collator([data.held_out[i]])
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], labels=batch["labels"]).logits
        loss = F.cross_entropy(logits[0], batch["labels"][0], reduction="sum").item()
        for key in ("eval_loss", f"eval_{data.denoisers[int(batch['denoiser'])]}_loss"):
            total = sums.setdefault(key, [0.0, 0])
            total[0] += loss
            total[1] += batch["labels"].numel()
    assert len(sums) > 3
    for entry in figures:
        assert {k for k in entry if k.startswith("eval_") and k.endswith("loss")} == sums.keys()
        for key, (loss, targets) in sums.items():
            assert entry[key] == pytest.approx(loss / targets, rel=1e-5), key


def test_the_trained_repo_loads_where_fat5_is_not_and_exports_to_stock(trained, tmp_path):
    """The fresh process prints logits; they are those of the export in stock transformers."""
    code = """
import sys
sys.modules["fat5"] = None  # importing it fails
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
batch = tokenizer(["the old cat sees", "a dog"], padding=True, return_tensors="pt")
batch = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
model.generate(**batch, max_new_tokens=3)
torch.save((batch, model(**batch, decoder_input_ids=batch["input_ids"]).logits), sys.argv[2])
"""
    arguments = [str(trained / "model"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=tmp_path)
    batch, logits = torch.load(tmp_path / "logits.pt")
    from fat5convert.cli import main as fat5convert

    result = CliRunner().invoke(fat5convert, ["export", str(trained / "model"), str(tmp_path / "stock")])
    assert result.exit_code == 0, result.output
    stock = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "stock").eval()
    assert type(stock).__name__ == "T5ForConditionalGeneration"
    expected = stock(**batch, decoder_input_ids=batch["input_ids"]).logits
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not list(trained.joinpath("model").glob("*.bin"))


@pytest.mark.slow
def test_it_works_without_datasets(toy, tmp_path):
    code = 'import sys; sys.modules["datasets"] = None; from fat5.cli import main; main()'
    arguments = [part for setting in toy.settings(tmp_path / "out") for part in ("--set", setting)]
    command = [sys.executable, "-c", code, "pretrain", str(SMOKE), *arguments]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__path": "{stock}"}, "is not a FAT5 checkpoint (its model_type is t5); run `fat5convert"),
        ({"output__folder": "/proc/out"}, "/proc/out: No such file or directory (output.folder is /proc/out"),
        ({"model__path": "{stock}/.."}, "no config.json there that names a model_type (a relative path begins in the"),
        ({"model__path": "{stock}/absent"}, "absent is no model's folder or Hub id"),
        ({"data__train": "[{files: [absent-*.txt]}]"}, "absent-*.txt"),
        ({"data__train": "[{files: [absent.txt], streaming: true}]"}, "no file matches absent.txt"),
        (
            {"data__train": "[{files: [a.txt], streaming: true}, {files: [b.txt], streaming: true}]"},
            "several streamed corpora need weights",
        ),
        (
            {"training__schedule": "wsd"},
            "training.schedule_options do not fit schedule wsd: ",
        ),
        ({"training__schedule_options": "{speed: 3}"}, "unexpected keyword argument 'speed'"),
        ({"mixture__name": "ul3"}, "name 'ul3' is no mixture"),
        ({"data__sentinels": "mt5"}, "too few for the sentinels of mt5"),
    ],
)
def test_what_cannot_start_says_why_and_leaves_nothing(toy, tmp_path, changes, message):
    changes = {key: value.format(stock=toy.stock) if "stock" in value else value for key, value in changes.items()}
    result = run(toy.settings(tmp_path / "out", **changes))
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json"])
def test_a_repo_that_is_not_whole_is_refused(toy, tmp_path, missing):
    shutil.copytree(toy.model, tmp_path / "model")
    for path in (tmp_path / "model").glob(missing.replace("tokenizer.json", "tokenizer*")):
        path.unlink()
    result = run(toy.settings(tmp_path / "out", model__path=tmp_path / "model"))
    assert result.exit_code == 1, result.output
    assert str(tmp_path / "model") in result.output


def test_every_command_of_the_group_is_there():
    for name in COMMANDS:
        assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0


def test_wrong_usage_is_told_apart(tmp_path):
    assert run([], recipe=tmp_path / "absent.yaml").exit_code == 2
    assert CliRunner().invoke(main, ["pretrain"]).exit_code == 2
    assert "--set KEY=VALUE" in CliRunner().invoke(main, ["pretrain", "--help"]).output


@pytest.mark.parametrize("tied", [True, False])
def test_added_rows_start_at_the_mean_and_the_others_stay(tied):
    from toy_training import toy_model

    model = toy_model(tie_word_embeddings=tied)
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    add_rows(model, 48)
    assert model.config.vocab_size == 48
    add_rows(model, 51)
    assert model.config.vocab_size == model.shared.num_embeddings == model.lm_head.out_features == 64
    for name in ("shared.weight", "lm_head.weight"):
        weight = model.state_dict()[name]
        assert torch.equal(weight[:48], before[name])
        torch.testing.assert_close(weight[48:], before[name].mean(0).expand(16, -1))
    assert (model.lm_head.weight is model.shared.weight) == tied
