"""Every bad input: one clear message, exit code 1, nothing left behind, nothing run."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from toy_checkpoints import all_tensors, edit_config, pieces, rewrite, write_checkpoint
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LongT5Config,
    LongT5ForConditionalGeneration,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from fat5convert.cli import main


def fails(args: list[str], folder: Path, *words: str) -> Result:
    """Run the command; it must fail with these words and leave `folder` as it was."""
    before = sorted(folder.iterdir())
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 1, result.output
    assert result.output.startswith("Error: ")
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output
    assert sorted(folder.iterdir()) == before
    return result


TINY = {"vocab_size": 30, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
STRANGERS: dict[str, Callable[[], Any]] = {
    "BERT": lambda: BertModel(
        BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ),
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2)),
    "LongT5": lambda: LongT5ForConditionalGeneration(LongT5Config(**TINY)),
    "Switch": lambda: SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(**TINY, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=2)
    ),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_models_that_are_no_t5(name: str, tmp_path: Path) -> None:
    STRANGERS[name]().save_pretrained(tmp_path / "model")
    fails([str(tmp_path / "model"), str(tmp_path / "out")], tmp_path, name, "config.json")


@pytest.mark.parametrize(
    ("model_type", "word"),
    [
        ("t5gemma", "T5Gemma"),
        ("t5gemma2", "T5Gemma 2"),
        ("udop", "UDOP"),
        ("pop2piano", "Pop2Piano"),
        ("flash_t5", "FAT5 model already"),
        ("llama", "'llama' is no T5"),
        (["t5"], "is no T5"),
    ],
)
def test_other_model_types(model_type: object, word: str, flan: Path, tmp_path: Path) -> None:
    edit_config(flan, model_type=model_type)
    fails([str(flan), str(tmp_path / "out")], tmp_path, word)


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_missing_shard(weights: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "t5-v1.1", weights=weights, sharded=True)
    shard = sorted(folder.glob("*-00002-of-*"))[0]
    shard.unlink()
    fails([str(folder), str(tmp_path / "out")], tmp_path, shard.name, "missing")


@pytest.mark.parametrize("kept", [0, 5, 500, -1])
def test_truncated_safetensors(kept: int, flan: Path, tmp_path: Path) -> None:
    path = flan / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    fails([str(flan), str(tmp_path / "out")], tmp_path, "model.safetensors", "truncated")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kept", [0, 100, 5000, -100])
def test_truncated_bin(kept: int, legacy: bool, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "t5-v1.1", weights="bin")
    path = folder / "pytorch_model.bin"
    if legacy:
        torch.save(all_tensors(folder), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:kept])
    fails([str(folder), str(tmp_path / "out")], tmp_path, "pytorch_model.bin", "truncated")


def header_of(tensors: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (struct.pack("<Q", 2**63) + b"{}", "truncated"),
        (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
        (struct.pack("<Q", 4) + b"\xff\xfe{}", "unreadable"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "unreadable"),
        (struct.pack("<Q", 19) + b'{"a": {}, "a": {} }', "twice"),
        (header_of({"a": F32 | {"dtype": "Q4"}}, b"0" * 8), "unknown dtype"),
        (header_of({"a": F32 | {"shape": [-2]}}, b"0" * 8), "malformed"),
        (header_of({"a": F32 | {"shape": [3]}}, b"0" * 8), "cannot fill"),
        (header_of({"a": F32 | {"shape": [2**40, 2**40]}}, b"0" * 8), "cannot fill"),
        (header_of({"a": F32, "b": F32}, b"0" * 8), "overlap"),
        (header_of({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, b"0" * 20), "gap"),
        (header_of({"a": F32}, b"0" * 9), "account"),
        (header_of({"a": 3}), "no description"),
    ],
)
def test_malformed_safetensors(content: bytes, word: str, flan: Path, tmp_path: Path) -> None:
    (flan / "model.safetensors").write_bytes(content)
    fails([str(flan), str(tmp_path / "out")], tmp_path, "model.safetensors", word)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/hosts", "sub/model.safetensors", "model.bin", 3])
def test_index_leading_elsewhere(shard: object, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "t5-v1.1", sharded=True)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["shared.weight"] = shard
    path.write_text(json.dumps(index))
    fails([str(folder), str(tmp_path / "out")], tmp_path, path.name, repr(shard))


def test_index_naming_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "t5-v1.1", sharded=True)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost.weight"] = index["weight_map"]["shared.weight"]
    path.write_text(json.dumps(index))
    fails([str(folder), str(tmp_path / "out")], tmp_path, "ghost.weight")


Q = "decoder.block.1.layer.1.EncDecAttention.q.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({Q: torch.zeros(24, 33)}), ("wrong shape", Q, "[24, 33]", "[24, 32]")),
        (lambda t: t.update({"adapter.weight": torch.zeros(3)}), ("unknown", "adapter.weight")),
        (lambda t: t.pop(Q), ("missing", Q)),
        (lambda t: t.update({Q: t[Q].to(torch.int8)}), (Q, "int8")),
        (
            lambda t: t.update({"encoder.embed_tokens.weight": torch.zeros(120, 32)}),
            ("encoder.embed_tokens", "differs"),
        ),
    ],
)
def test_tensors_that_do_not_fit(
    change: Callable[[Any], None], words: tuple[str, ...], flan: Path, tmp_path: Path
) -> None:
    rewrite(flan, change)
    result = fails([str(flan), str(tmp_path / "out")], tmp_path, *words)
    assert result.output.startswith(f"Error: {flan}/model.safetensors: ")


def test_a_wrong_shape_is_said_with_the_shard_that_has_it(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "t5-v1.1", sharded=True)
    shard = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][Q]
    tensors = load_file(folder / shard)
    tensors[Q] = torch.zeros(24, 33)
    save_file(tensors, folder / shard)
    where = f"Error: {folder}: the tensors do not fit {folder}/config.json"
    what = f"{Q} in {shard} has shape [24, 33], the config asks for [24, 32]"
    fails([str(folder), str(tmp_path / "out")], tmp_path, where, what)


class RunsCode:
    """Unpickles by creating a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_that_would_run_code(legacy: bool, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "t5-v1.0", weights="bin")
    tensors = all_tensors(folder) | {"extra": RunsCode(tmp_path / "it-ran")}
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    fails([str(folder), str(tmp_path / "out")], tmp_path, "pytorch_model.bin", "would run code", "mkdir")
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_bare_pickle_that_would_run_code(protocol: int, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "t5-v1.0", weights="bin")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(RunsCode(tmp_path / "it-ran"), protocol))
    fails([str(folder), str(tmp_path / "out")], tmp_path, "pytorch_model.bin", "would run code", "mkdir")
    assert not (tmp_path / "it-ran").exists()


def test_pointer_of_git_lfs(flan: Path, tmp_path: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 307867048\n"
    (flan / "model.safetensors").write_text(pointer)
    fails([str(flan), str(tmp_path / "out")], tmp_path, "model.safetensors", "git lfs pull")


def test_bin_that_is_no_state_dict(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "t5-v1.0", weights="bin")
    torch.save({"state_dict": all_tensors(folder)}, folder / "pytorch_model.bin")
    fails([str(folder), str(tmp_path / "out")], tmp_path, "pytorch_model.bin", "state dict")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"d_model": "32"}, "d_model"),
        ({"d_model": -1}, "d_model"),
        ({"num_layers": 10**12}, "num_layers"),
        ({"num_layers": True}, "num_layers"),
        ({"d_ff": None}, "d_ff is missing"),
        ({"feed_forward_proj": "gated-swish-7"}, "feed_forward_proj"),
        ({"feed_forward_proj": {}}, "feed_forward_proj"),
        ({"dropout_rate": "a lot"}, "dropout_rate"),
        ({"relative_attention_num_buckets": 3}, "relative_attention_num_buckets"),
        ({"relative_attention_num_buckets": 16}, "wrong shape"),
        ({"use_cache": "often"}, "use_cache"),
        ({"relative_attention_max_distance": 9}, "relative_attention_max_distance"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_layers": 4}, "missing tensor"),
        ({"num_layers": 10**8}, "more layers"),
        ({"num_heads": 4}, "wrong shape"),
        ({"feed_forward_proj": "relu", "dense_act_fn": "relu", "is_gated_act": False}, "wi.weight"),
        ({"feed_forward_proj": "relu"}, "contradicts"),
        ({"model_type": "umt5"}, "relative_attention_bias"),
        ({"pad_token_id": "pad"}, "pad_token_id"),
        ({"eos_token_id": 1.5}, "eos_token_id"),
    ],
)
def test_configs_that_do_not_fit(changes: dict[str, Any], word: str, flan: Path, tmp_path: Path) -> None:
    edit_config(flan, **changes)
    fails([str(flan), str(tmp_path / "out")], tmp_path, "config.json", word)


@pytest.mark.parametrize("content", ["", "{", "[]", '"t5"', "\x00"])
def test_unreadable_config(content: str, flan: Path, tmp_path: Path) -> None:
    (flan / "config.json").write_text(content)
    fails([str(flan), str(tmp_path / "out")], tmp_path, "config.json")


WORDS = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>")).to_str().encode()
SIDE_FILES: dict[str, bytes] = {
    "tokenizer.json": WORDS,
    "spiece.model": pieces(),
    "tokenizer_config.json": b'{"tokenizer_class": "T5Tokenizer"}',
    "special_tokens_map.json": b'{"eos_token": "</s>"}',
    "generation_config.json": b'{"eos_token_id": 1}',
}


@pytest.mark.parametrize("name", SIDE_FILES)
def test_side_files_that_are_damaged(name: str, flan: Path, converted: dict[str, Path], tmp_path: Path) -> None:
    """In neither direction are they carried over, and not even a dry run says that they would be."""
    out = shutil.copytree(converted["t5-v1.1"], tmp_path / "fat5")
    whole = SIDE_FILES[name]
    for content in (b"", whole[: len(whole) // 2], b"[]"):
        for folder in (flan, out):
            (folder / name).write_bytes(content)
        for command in ([str(flan)], [str(flan), "--dry-run"], ["export", str(out)]):
            place = out if "export" in command else flan
            fails([*command, str(tmp_path / "new")], tmp_path, f"{place / name}: damaged", "Download or copy it again")


def test_side_files_that_are_whole(flan: Path, tmp_path: Path) -> None:
    for name, content in SIDE_FILES.items():
        (flan / name).write_bytes(content)
    result = CliRunner().invoke(main, [str(flan), str(tmp_path / "out"), "--no-verify"])
    assert result.exit_code == 0, result.output
    kept = {name: (tmp_path / "out" / name).read_bytes() for name in ("tokenizer.json", "spiece.model")}
    assert kept == {name: SIDE_FILES[name] for name in kept}


def test_no_model_type_and_no_t5(tmp_path: Path) -> None:
    STRANGERS["BERT"]().save_pretrained(tmp_path / "model")
    edit_config(tmp_path / "model", model_type=None)
    fails([str(tmp_path / "model"), str(tmp_path / "out")], tmp_path, "no model_type")


def test_no_model_type_and_a_shape_that_fits_none(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "umt5")
    rewrite(folder, lambda t: t.pop("encoder.block.2.layer.0.SelfAttention.relative_attention_bias.weight"))
    fails([str(folder), str(tmp_path / "out")], tmp_path, "encoder.block.2", "relative_attention_bias")


def test_no_weights(flan: Path, tmp_path: Path) -> None:
    (flan / "model.safetensors").unlink()
    fails([str(flan), str(tmp_path / "out")], tmp_path, "no weights", "model.safetensors.index.json")


@pytest.mark.parametrize("command", [[], ["--overwrite"]])
def test_existing_out(command: list[str], flan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("irreplaceable")
    fails([str(flan), str(out), *command], tmp_path, "exists")
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_out_that_is_the_source(flan: Path, tmp_path: Path) -> None:
    fails([str(flan), str(flan), "--overwrite"], tmp_path, "exists")
    assert (flan / "model.safetensors").exists()


def test_unwritable_out(flan: Path, tmp_path: Path) -> None:
    """A file as parent folder: unwritable for root too."""
    (tmp_path / "file").write_text("")
    fails([str(flan), str(tmp_path / "file" / "out")], tmp_path, "file/out", "cannot be written", "file is a file")


@pytest.mark.parametrize("model", ["./nowhere", "/no/such/folder", "a/b/c"])
def test_no_such_folder(model: str, tmp_path: Path) -> None:
    fails([model, str(tmp_path / "out")], tmp_path, model, "no such folder")


def test_a_file_as_model(flan: Path, tmp_path: Path) -> None:
    fails([str(flan / "model.safetensors"), str(tmp_path / "out")], tmp_path, "--config", "t5-v1_1-xxl")
    fails([str(flan / "config.json"), str(tmp_path / "out")], tmp_path, "no weight file")
    fails([str(flan), str(tmp_path / "out"), "--config", "t5-small"], tmp_path, "for single files")


def test_revision_of_a_folder(flan: Path, tmp_path: Path) -> None:
    fails([str(flan), str(tmp_path / "out"), "--revision", "main"], tmp_path, "--revision")


@pytest.mark.parametrize("command", ["verify", "export"])
def test_out_that_is_no_conversion(command: str, flan: Path, tmp_path: Path) -> None:
    args = [str(tmp_path / "t5")] if command == "export" else []
    fails([command, str(flan), *args], tmp_path, "no FAT5 model")
    fails([command, str(tmp_path / "nowhere"), *args], tmp_path, "no such folder")
