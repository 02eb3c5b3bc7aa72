"""A FAT5 folder goes back to stock T5: the same bits, the same logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_checkpoints import FAMILIES, all_tensors, edit_config, pieces, rewrite, write_checkpoint
from toy_layouts import make_encoder, write_config, write_published_fat5, write_wan

from fat5.model import FlashT5ForConditionalGeneration
from fat5convert.convert import convert
from fat5convert.errors import ConvertError
from fat5convert.export import export

IDS = torch.arange(2, 62).reshape(2, 30)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, labels=IDS[:, :9].contiguous()).logits


def load_stock(family: str, folder: Path) -> Any:
    return FAMILIES[family].model_class.from_pretrained(folder, attn_implementation="eager")


@pytest.mark.parametrize(
    ("weights", "dialect"),
    [
        ("safetensors", 4),
        ("bin", 5),
        pytest.param("safetensors", 5, marks=pytest.mark.slow),
        pytest.param("bin", 4, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bit_identical(family: str, weights: str, dialect: int, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", family, dialect=dialect, weights=weights)
    convert(str(source), tmp_path / "out", verify=False)
    exported = export(tmp_path / "out", tmp_path / "t5")
    before, after = all_tensors(source), all_tensors(tmp_path / "t5")
    assert set(before) - set(after) == set(exported.not_restored)
    assert set(after) - set(before) == set()
    for name, tensor in after.items():
        assert torch.equal(tensor.view(torch.int32), before[name].view(torch.int32)), name
    assert torch.equal(logits(load_stock(family, source)), logits(load_stock(family, tmp_path / "t5")))
    config = json.loads((tmp_path / "t5" / "config.json").read_text())
    assert config["model_type"] == {"umt5": "umt5", "mt5": "mt5"}.get(family, "t5")
    assert config["tie_word_embeddings"] is FAMILIES[family].scaled, "what transformers 4 reads: tied and scaled"
    assert bool(exported.warnings) == (family == "umt5")


def test_a_head_that_is_missing_is_not_made_of_the_embedding(flan: Path, tmp_path: Path) -> None:
    convert(str(flan), tmp_path / "out", verify=False)
    rewrite(tmp_path / "out", lambda t: t.pop("lm_head.weight"))
    with pytest.raises(ConvertError, match=r"1 missing tensor\(s\): lm_head.weight"):
        export(tmp_path / "out", tmp_path / "t5")
    assert not (tmp_path / "t5").exists()


def test_tied_but_unscaled_stores_the_head(flan: Path, tmp_path: Path) -> None:
    rewrite(flan, lambda t: t.pop("lm_head.weight"))
    convert(str(flan), tmp_path / "out", verify=False)
    export(tmp_path / "out", tmp_path / "t5")
    tensors = all_tensors(tmp_path / "t5")
    assert torch.equal(tensors["lm_head.weight"], tensors["shared.weight"])
    assert json.loads((tmp_path / "t5" / "config.json").read_text())["tie_word_embeddings"] is False
    stock = load_stock("t5-v1.1", tmp_path / "t5")
    assert stock.config.scale_decoder_outputs is False
    assert torch.equal(logits(stock), logits(load_stock("t5-v1.1", flan)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_model_without_provenance(family: str, converted: dict[str, Path], tmp_path: Path) -> None:
    """As training leaves it: other weights, a larger vocabulary, `save_pretrained`, no conversion.json."""
    ours = FlashT5ForConditionalGeneration.from_pretrained(converted[family], attn_implementation="eager")
    ours.resize_token_embeddings(400, mean_resizing=False)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.01)
    ours.save_pretrained(tmp_path / "trained")
    assert not (tmp_path / "trained" / "conversion.json").exists()
    exported = export(tmp_path / "trained", tmp_path / "t5")
    assert exported.not_restored == {}
    # The config itself says where the model came from, and saving keeps that.
    assert exported.model_type == {"umt5": "umt5", "mt5": "mt5"}.get(family, "t5")
    stock = load_stock(family, tmp_path / "t5")
    expected = logits(ours)
    if family == "umt5":
        stock.config.tie_word_embeddings = False  # keeps stock's forward from scaling
    assert (logits(stock) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_side_files_come_along(flan: Path, tmp_path: Path) -> None:
    (flan / "spiece.model").write_bytes(pieces())
    (flan / "tokenizer_config.json").write_text('{"model_max_length": 77}')
    edit_config(flan, task_specific_params={"a": 1})
    convert(str(flan), tmp_path / "out", verify=False)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings == {"model_max_length": 77, "tokenizer_class": "T5Tokenizer"}
    export(tmp_path / "out", tmp_path / "t5")
    assert (tmp_path / "t5" / "spiece.model").read_bytes() == (flan / "spiece.model").read_bytes()
    generation = json.loads((flan / "generation_config.json").read_text())
    assert json.loads((tmp_path / "t5" / "generation_config.json").read_text()) == generation
    assert json.loads((tmp_path / "t5" / "config.json").read_text())["task_specific_params"] == {"a": 1}
    assert not list((tmp_path / "t5").glob("*.py"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_scale": None}, "attention_scale.*no power of two"),
        ({"model_type": "t5"}, "no FAT5 model"),
        ({"d_ff": 49}, "wrong shape"),
        ({"num_heads": "many"}, "num_heads"),
    ],
)
def test_what_stock_cannot_express(changes: dict[str, Any], message: str, flan: Path, tmp_path: Path) -> None:
    convert(str(flan), tmp_path / "out", verify=False)
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConvertError, match=message):
        export(tmp_path / "out", tmp_path / "t5")
    assert not (tmp_path / "t5").exists()


@pytest.mark.parametrize("dialect", [4, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_either_dialect(family: str, dialect: int, converted: dict[str, Path], tmp_path: Path) -> None:
    export(converted[family], tmp_path / "t5", transformers=dialect)
    config = json.loads((tmp_path / "t5" / "config.json").read_text())
    assert ("dtype" in config, "torch_dtype" in config) == (dialect == 5, dialect == 4)
    assert ("scale_decoder_outputs" in config) == (dialect == 5 and config["model_type"] == "t5")
    export(converted[family], tmp_path / "both")
    theirs, ours = load_stock(family, tmp_path / "t5"), load_stock(family, tmp_path / "both")
    assert torch.equal(logits(theirs), logits(ours))
    assert getattr(theirs.config, "scale_decoder_outputs", None) == getattr(ours.config, "scale_decoder_outputs", None)


def encoder_states(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).last_hidden_state


@pytest.mark.parametrize("model_type", ["t5", "umt5"])
def test_an_encoder_goes_back_to_an_encoder(model_type: str, tmp_path: Path) -> None:
    stock = make_encoder(model_type)
    stock.save_pretrained(tmp_path / "source")
    convert(str(tmp_path / "source"), tmp_path / "out", verify=False)
    exported = export(tmp_path / "out", tmp_path / "t5")
    assert exported.model_type == model_type
    before, after = all_tensors(tmp_path / "source"), all_tensors(tmp_path / "t5")
    assert before.keys() - set(exported.not_restored) == after.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    back = type(stock).from_pretrained(tmp_path / "t5", attn_implementation="eager")
    assert torch.equal(encoder_states(back), encoder_states(stock))


def test_wan_becomes_a_stock_umt5(tmp_path: Path) -> None:
    stock = make_encoder("umt5")
    path = write_wan(tmp_path / "wan.pth", stock)
    convert(str(path), tmp_path / "out", config=str(write_config(tmp_path / "umt5.json", stock)), verify=False)
    export(tmp_path / "out", tmp_path / "t5")
    back = type(stock).from_pretrained(tmp_path / "t5", attn_implementation="eager")
    assert torch.equal(encoder_states(back), encoder_states(stock))


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_published_fat5_becomes_a_stock_t5(scale: float, originals: dict[str, Path], tmp_path: Path) -> None:
    """A scale that is a power of two goes into the queries, exactly."""
    source = write_published_fat5(tmp_path / "source", originals["t5-v1.1"], attention_scale=scale)
    convert(str(source), tmp_path / "out", verify=False)
    export(tmp_path / "out", tmp_path / "t5")
    before, after = all_tensors(originals["t5-v1.1"]), all_tensors(tmp_path / "t5")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        factor = scale if name.endswith("Attention.q.weight") else 1.0
        assert torch.equal(after[name], tensor * factor), name
    config = json.loads((tmp_path / "t5" / "config.json").read_text())
    assert not {"use_glu_mlp", "attention_type", "auto_map"} & config.keys()
    ours = FlashT5ForConditionalGeneration.from_pretrained(tmp_path / "out", attn_implementation="eager")
    expected = logits(ours)
    assert (logits(load_stock("t5-v1.1", tmp_path / "t5")) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_does_not_replace_what_is_no_t5(converted: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "notes.txt").write_text("mine")
    with pytest.raises(ConvertError, match="does not look like"):
        export(converted["mt5"], tmp_path / "diary", overwrite=True)
    assert (tmp_path / "diary" / "notes.txt").read_text() == "mine"
