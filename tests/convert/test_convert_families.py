"""Every family, dialect and file format converts to a model that computes what stock transformers computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from toy_checkpoints import FAMILIES, all_tensors, edit_config, make_model, rewrite, write_checkpoint
from transformers import T5ForConditionalGeneration

from fat5.model import FlashT5ForConditionalGeneration
from fat5convert.convert import convert, plan_conversion
from fat5convert.source import Checkpoint, local
from fat5convert.verify import verify

BATCH, SOURCE, TARGET = 3, 40, 11


def inputs(vocab_size: int) -> dict[str, torch.Tensor]:
    """Right- and left-padded rows beside a full one."""
    ids = torch.randint(2, vocab_size, (BATCH, SOURCE))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    mask[2, :30] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def agree(stock: Any, ours: Any, implementation: str) -> None:
    bound = {"eager": 1e-5, "sdpa": 1e-4}[implementation]
    batch = inputs(stock.config.vocab_size)
    labels = torch.randint(2, stock.config.vocab_size, (BATCH, TARGET))
    labels[1, 5:] = -100
    with torch.no_grad():
        expected, got = stock(**batch, labels=labels), ours(**batch, labels=labels)
    real = labels != -100
    scale = expected.logits[real].abs().max()
    assert (got.logits - expected.logits)[real].abs().max() <= bound * scale
    assert abs(got.loss - expected.loss) <= bound * scale
    seen = batch["attention_mask"] == 1
    states = expected.encoder_last_hidden_state[seen]
    assert (got.encoder_last_hidden_state[seen] - states).abs().max() <= bound * states.abs().max()
    for search in ({"num_beams": 1}, {"num_beams": 3}):
        kwargs = batch | search | {"do_sample": False, "max_new_tokens": 12}
        assert torch.equal(stock.generate(**kwargs), ours.generate(**kwargs)), search


def unscale_umt5(stock: Any) -> Any:
    """Stock umT5 of transformers 5 scales its logits where this is true, and for nothing else."""
    if stock.config.model_type == "umt5":
        stock.config.tie_word_embeddings = False
    return stock


LAYOUTS = [
    pytest.param(4, "safetensors", False, id="v4-safetensors", marks=pytest.mark.slow),
    pytest.param(5, "safetensors", True, id="v5-safetensors-sharded"),
    pytest.param(4, "bin", True, id="v4-bin-sharded"),
    pytest.param(5, "bin", False, id="v5-bin", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("dialect", "weights", "sharded"), LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_converts_to_what_stock_computes(
    family: str, dialect: int, weights: str, sharded: bool, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "source", family, dialect=dialect, weights=weights, sharded=sharded)
    report = convert(str(source), tmp_path / "out", shard_size=30_000 if sharded else 10**9)
    assert report.parity is not None
    assert report.parity["result"] == "same"

    shape, facts = FAMILIES[family], report.plan.recognised
    assert (facts.title, facts.layout.tied, facts.scaled) == (shape.title, not shape.untied, shape.scaled)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > (3 if sharded else 0)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == sharded
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] == (not shape.untied)
    assert config["relative_attention_per_layer"] == (family == "umt5")
    assert config["dtype"] == "float32"

    stock = unscale_umt5(make_model(family))
    for implementation in ("eager", "sdpa"):
        ours = FlashT5ForConditionalGeneration.from_pretrained(tmp_path / "out", attn_implementation=implementation)
        agree(stock, ours.eval(), implementation)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_stock(family: str, converted: dict[str, Path]) -> None:
    stock = unscale_umt5(make_model(family))
    ours = FlashT5ForConditionalGeneration.from_pretrained(converted[family], attn_implementation="eager").eval()
    batch = inputs(stock.config.vocab_size) | {"labels": torch.randint(2, 100, (BATCH, TARGET))}
    stock(**batch).loss.backward()
    ours(**batch).loss.backward()
    expected, got = dict(stock.named_parameters()), dict(ours.named_parameters())
    pairs = plan_conversion(str(write_checkpoint(converted[family].parent / "again", family))).recognised.pairs
    assert {pair.fat5 for pair in pairs} == set(got)
    for pair in pairs:
        gradient = expected[pair.t5].grad
        assert (got[pair.fat5].grad - gradient).abs().max() <= 1e-4 * gradient.abs().max(), pair.fat5


def test_the_true_shape_of_flan_t5_small(tmp_path: Path) -> None:
    sizes = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_heads": 6}
    source = write_checkpoint(tmp_path / "source", "t5-v1.1", spread=None, num_layers=8, num_decoder_layers=8, **sizes)
    report = convert(str(source), tmp_path / "out")
    assert report.plan.parameters == 76_961_152  # as google/flan-t5-small
    assert report.parity is not None
    stock = T5ForConditionalGeneration.from_pretrained(source, attn_implementation="eager").eval()
    ours = FlashT5ForConditionalGeneration.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    agree(stock, ours, "eager")


def test_embedding_under_another_name(flan: Path, tmp_path: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["decoder.embed_tokens.weight"] = tensors.pop("shared.weight")

    rewrite(flan, rename)
    report = convert(str(flan), tmp_path / "out")
    assert report.conversion["tensors"]["shared.weight"]["source"] == "decoder.embed_tokens.weight"


def test_leftovers_are_named(flan: Path, tmp_path: Path) -> None:
    dead = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
        tensors[dead] = torch.randn(32, 3)

    rewrite(flan, add)
    report = convert(str(flan), tmp_path / "out")
    assert set(report.conversion["leftovers"]) == {"encoder.embed_tokens.weight", dead}
    assert not set(report.conversion["leftovers"]) & set(all_tensors(tmp_path / "out"))


def test_a_stored_copy_of_a_tied_head_is_tied(flan: Path, tmp_path: Path) -> None:
    rewrite(flan, lambda t: t.update({"lm_head.weight": t["shared.weight"].clone()}))
    report = convert(str(flan), tmp_path / "out")
    decisions = report.conversion["decisions"]
    assert decisions["tie_word_embeddings"]["value"] is True
    assert decisions["scale_decoder_outputs"]["value"] is False
    assert "lm_head.weight" in report.conversion["leftovers"]


def test_a_differing_head_is_untied_whatever_the_config_says(originals: dict[str, Path], tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "t5-v1.0")
    rewrite(source, lambda t: t.update({"lm_head.weight": torch.randn(120, 32)}))
    recognised = plan_conversion(str(source)).recognised
    assert (recognised.layout.tied, recognised.scaled) == (False, True)
    convert(str(source), tmp_path / "out")  # which verifies: transformers 5 keeps that head, and scales


@pytest.mark.parametrize("start", [None, 7])
def test_first_decoder_token(start: int | None, flan: Path, tmp_path: Path) -> None:
    edit_config(flan, decoder_start_token_id=start, pad_token_id=5)
    (flan / "generation_config.json").unlink()
    convert(str(flan), tmp_path / "out", verify=False)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert generation["decoder_start_token_id"] == config["decoder_start_token_id"] == (start or 5)
    assert generation["eos_token_id"] == 1


def test_old_configs_without_the_younger_keys(originals: dict[str, Path], tmp_path: Path) -> None:
    """t5-small's config.json has neither the activation, nor the distance, nor the decoder's depth."""
    source = write_checkpoint(tmp_path / "source", "t5-v1.0", num_layers=2)
    edit_config(
        source,
        feed_forward_proj=None,
        relative_attention_max_distance=None,
        num_decoder_layers=None,
        dense_act_fn=None,
        is_gated_act=None,
        n_positions=512,
    )
    report = convert(str(source), tmp_path / "out")
    assert report.plan.recognised.config["feed_forward_proj"] == "relu"
    assert report.plan.recognised.config["relative_attention_max_distance"] == 128


def test_legacy_bin_from_before_zip_files(originals: dict[str, Path], tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "t5-v1.0", weights="bin")
    tensors = all_tensors(source)
    torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert(str(source), tmp_path / "out")


def test_hashes_are_those_of_the_bytes(converted: dict[str, Path]) -> None:
    import hashlib

    recorded = json.loads((converted["mt5"] / "conversion.json").read_text())["tensors"]
    tensors = all_tensors(converted["mt5"])
    assert recorded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        assert recorded[name]["sha256"] == recorded[name]["source_sha256"] == digest


def test_half_precision_files_keep_their_dtype(flan: Path, tmp_path: Path) -> None:
    rewrite(flan, lambda t: t.update({n: v.half() for n, v in t.items() if "layer_norm" not in n}))
    edit_config(flan, dtype="float16")
    convert(str(flan), tmp_path / "out")
    before, after = Checkpoint(local(flan)).tensors, Checkpoint(local(tmp_path / "out")).tensors
    assert sorted(str(i.dtype) for i in before.values()) == sorted(str(i.dtype) for i in after.values())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    assert verify(tmp_path / "out", str(flan))["result"] == "same"


def test_safetensors_win_over_bin(flan: Path, tmp_path: Path) -> None:
    """As in transformers."""
    save_file({"junk": torch.zeros(1)}, flan / "junk.safetensors")
    torch.save({"junk": torch.zeros(1)}, flan / "pytorch_model.bin")
    assert plan_conversion(str(flan)).checkpoint.weight_files == ["model.safetensors"]
