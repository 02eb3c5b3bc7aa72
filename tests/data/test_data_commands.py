"""`fat5 tokenize`, `fat5 train-tokenizer` and `fat5 data show`, called as from a shell."""

import json
import re

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoTokenizer

import fat5.data.setup
from fat5.cli import main
from fat5.data.load_tokenizer import load_tokenizer
from fat5.model import FlashT5Config, FlashT5ForConditionalGeneration


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def corpus(tmp_path, prose):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in prose))
    return path


@pytest.fixture
def model_folder(tmp_path, tokenizer):
    config = FlashT5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        tie_word_embeddings=False,
    )
    FlashT5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_tokenize_writes_once_and_then_finds(tmp_path, corpus, model_folder):
    arguments = ("tokenize", corpus, "--tokenizer", model_folder, "--cache", tmp_path / "cache")
    first, second = run(*arguments), run(*arguments)
    assert first.exit_code == second.exit_code == 0, first.output
    figures = re.compile(r"(\d+) documents, (\d+) tokens, (.*): (.*)")
    made, found = (figures.search(r.stdout).groups() for r in (first, second))
    assert made[0] == str(len(corpus.read_text().splitlines()))
    assert re.fullmatch(r"in [\d.]+ s", made[2])
    assert found[2] == "found tokenised already"
    assert (made[0], made[1], made[3]) == (found[0], found[1], found[3])


def test_tokenize_reports_what_is_wrong(tmp_path, corpus, model_folder):
    for arguments, message in (
        ((tmp_path / "none.txt", "--tokenizer", model_folder), "no file matches"),
        ((corpus, "--tokenizer", tmp_path / "nowhere"), "nowhere: no such folder"),
        ((corpus, "--tokenizer", tmp_path), "has no tokenizer that loads"),
        ((corpus, "--tokenizer", model_folder, "--field", "body"), "no field 'body'"),
        ((corpus, "--tokenizer", model_folder, "--sentinels", "mt5"), "too few for the sentinels of mt5"),
    ):
        result = run("tokenize", *arguments, "--cache", tmp_path / "cache")
        assert result.exit_code == 1
        assert message in result.output
        assert "Traceback" not in result.output
    assert run("tokenize", corpus, "--tokenizer", model_folder, "--dataset", corpus).exit_code == 2


def test_train_tokenizer_writes_a_tokenizer(tmp_path, corpus):
    result = run(
        "train-tokenizer", corpus, "--out", tmp_path / "t", "--kind", "bpe", "--size", 1200, "--sentinels", 200
    )
    assert result.exit_code == 0, result.output
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert tokenizer.convert_tokens_to_ids("<extra_id_199>") == len(tokenizer) - 200
    again = run("train-tokenizer", corpus, "--out", tmp_path / "t")
    assert again.exit_code == 1
    assert "exists already" in again.output


def test_train_tokenizer_extends_a_tokenizer_and_its_model(tmp_path, model_folder, tokenizer):
    original = tokenizer
    (tmp_path / "fr.txt").write_text("La maison était grande, cependant le château était vieux.\n\n" * 200)
    result = run(
        "train-tokenizer", tmp_path / "fr.txt", "--extend", model_folder, "--new-pieces", 12, "--out", tmp_path / "out"
    )
    assert result.exit_code == 0, result.output
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    old, new = (load_file(folder / "model.safetensors") for folder in (model_folder, tmp_path / "out"))
    added = int(re.search(r"(\d+) new pieces", result.output)[1])
    assert 1 < added <= 12
    assert len(tokenizer) == len(original) + added
    for name in ("shared.weight", "lm_head.weight"):
        assert new[name].shape[0] == len(tokenizer)
        assert torch.equal(new[name][: len(old[name])], old[name])
    assert old.keys() == new.keys()
    loaded = FlashT5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert not torch.equal(loaded.lm_head.weight, loaded.shared.weight)
    (tmp_path / "tokenizer_only").mkdir()
    tokenizer.save_pretrained(tmp_path / "tokenizer_only")
    only = ("--extend", tmp_path / "tokenizer_only", "--new-pieces", 3, "--out", tmp_path / "out2")
    assert run("train-tokenizer", tmp_path / "fr.txt", *only).exit_code == 0
    assert not (tmp_path / "out2" / "model.safetensors").exists()


def test_extending_a_stock_model_asks_for_conversion_first(tmp_path, model_folder, corpus):
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    result = run("train-tokenizer", corpus, "--extend", model_folder, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "run `fat5convert" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("packing", "streaming"), [("none", False), ("segments", False), ("stream", False), ("segments", True)]
)
def test_data_show_prints_examples_and_statistics(tmp_path, corpus, model_folder, monkeypatch, packing, streaming):
    kind = "streamed_batches" if streaming else "training_batches"
    make, sizes = getattr(fat5.data.setup, kind), {}
    monkeypatch.setattr(fat5.data.setup, kind, lambda *args, **kw: sizes.update(kw) or make(*args, **kw))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "model": {"path": str(model_folder)},
                "data": {
                    "train": [{"files": [str(corpus)], "format": "jsonl", "streaming": streaming}],
                    "max_input_length": 128,
                    "max_target_length": 128,
                    "cache": str(tmp_path / "cache"),
                    "packing": packing,
                },
                "training": {"steps": 1, "batch_size": 24, "micro_batch_size": 8},
                "output": {"folder": str(tmp_path / "out")},
            }
        )
    )
    result = CliRunner().invoke(main, ["data", "show", str(recipe), "--batches", "300"], color=True)
    assert result.exit_code == 0, result.output
    assert (sizes["batch_size"], sizes["batches_per_step"]) == (8, 3)  # as in training, which tells stages by steps
    plain = re.sub(r"\x1b\[[\d;]*m", "", result.output)
    for name in ("[R] span mu=3 r=0.15", "[S] prefix 0.25", "[X] span mu=64 r=0.5"):
        assert plain.count(name) == 2  # its examples, and its line of the table
    assert plain.count("  input   ") == plain.count("  target  ") == 15  # two of each, and the table's line
    assert "\x1b[31m\x1b[1m<0>\x1b[0m" in result.output  # the first sentinel is red
    # The share and the noise of each denoiser, beside the recipe's.
    shares = {
        m[1].strip(): [float(x) for x in m[2].split()]
        for m in re.finditer(r"^  (\S.*?)((?: +[\d.]+){3})$", plain, re.M)
    }
    assert shares["[S] prefix 0.25"][0] == 0.34
    assert shares["[S] prefix 0.25"][1] == pytest.approx(0.34, abs=0.03)
    assert shares["[S] prefix 0.25"][2] == pytest.approx(0.75, abs=0.02)
    assert shares["[X] span mu=3 r=0.5"][2] == pytest.approx(0.5, abs=0.03)
    padding = [float(x) for x in re.search(r"padding: input ([\d.]+)%, target ([\d.]+)%", plain).groups()]
    assert (padding == [0, 0]) == (packing == "stream")
    if packing != "none":  # the side that binds is full, of streamed corpora as well
        used = re.search(r"token budget used: input ([\d.]+)%, target ([\d.]+)%", plain).groups()
        assert max(map(float, used)) > 97
    assert plain.startswith("\n[R]")
    assert "300 batches" in plain


def test_data_show_reports_what_is_wrong(tmp_path, model_folder):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {path: x}\ndata: {trian: []}\ntraining: {steps: 1}\noutput: {folder: x}\n")
    result = run("data", "show", recipe)
    assert result.exit_code == 1
    assert "did you mean train" in result.output
