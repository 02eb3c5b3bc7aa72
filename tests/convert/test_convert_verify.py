"""Verification notices what it is there to notice."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_checkpoints import FAMILIES, edit_config, rewrite

from fat5.model import FlashT5ForConditionalGeneration
from fat5convert import parity
from fat5convert.convert import convert
from fat5convert.errors import ConvertError, DifferenceError
from fat5convert.verify import PARITY_SCHEMA, verify


@pytest.fixture
def out(converted: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted["t5-v1.1"], tmp_path / "out"))


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("against", [False, True])
def test_a_flipped_bit(against: bool, out: Path, originals: dict[str, Path]) -> None:
    source = str(originals["t5-v1.1"]) if against else None
    assert verify(out, source)["result"] == "same"
    flip_a_bit(out)
    found = verify(out, source)
    assert found["result"] == "different"
    assert len(found["differences"]) == 1
    assert found["differences"][0].startswith("tensor ")


def test_another_source(out: Path, originals: dict[str, Path]) -> None:
    found = verify(out, str(originals["mt5"]))
    assert found["result"] == "different"
    assert len(found["differences"]) > 30


@pytest.mark.parametrize(
    ("key", "value"), [("scale_decoder_outputs", True), ("relative_attention_max_distance", 64), ("pad_token_id", 3)]
)
def test_a_changed_config(key: str, value: object, out: Path, originals: dict[str, Path]) -> None:
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    found = verify(out, str(originals["t5-v1.1"]))
    assert sum(key in difference for difference in found["differences"]) == 1


def test_changed_code(out: Path) -> None:
    with open(out / "modeling_flash_t5.py", "a") as file:
        file.write("\n# changed\n")
    assert "modeling_flash_t5.py" in verify(out)["differences"][0]


@pytest.mark.parametrize("change", ["remove", "add"])
@pytest.mark.parametrize("against", [False, True])
def test_missing_and_added_tensors(change: str, against: bool, out: Path, originals: dict[str, Path]) -> None:
    tensors = load_file(out / "model.safetensors")
    if change == "remove":
        del tensors["lm_head.weight"]
    else:
        tensors["extra"] = torch.zeros(1)
    save_file(tensors, out / "model.safetensors")
    found = verify(out, str(originals["t5-v1.1"]) if against else None)
    assert len(found["differences"]) == 1
    assert ("lm_head.weight" if change == "remove" else "extra") in found["differences"][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_really_compared(
    family: str, originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that loads other weights than its file holds is caught by what it computes, and OUT does not appear."""
    load = FlashT5ForConditionalGeneration.from_pretrained

    def load_with_an_error(*args: object, **kwargs: object) -> torch.nn.Module:
        model = load(*args, **kwargs)
        with torch.no_grad():
            model.decoder.block[1].cross_attention_layer.cross_attention.o.weight[0, 0] += 0.5
        return model

    monkeypatch.setattr(FlashT5ForConditionalGeneration, "from_pretrained", load_with_an_error)
    with pytest.raises(DifferenceError, match="eager: logits_error"):
        convert(str(originals[family]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["t5-v1.0", "t5-v1.1", "umt5"])
def test_a_wrong_scale_is_caught(
    family: str, originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the family table wrong about scaling, the oracle, which does not read it, would say so."""
    from fat5convert import recognise

    right = recognise.read_scaling
    monkeypatch.setattr(recognise, "read_scaling", lambda raw, family: (not right(raw, family)[0], "wrong on purpose"))
    with pytest.raises(DifferenceError, match="logits_error"):
        convert(str(originals[family]), tmp_path / "out")


def test_nan_is_a_difference(flan: Path, tmp_path: Path) -> None:
    tensors = load_file(flan / "model.safetensors")
    tensors["encoder.final_layer_norm.weight"][0] = float("nan")
    save_file(tensors, flan / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DifferenceError, match="nan"):
        convert(str(flan), tmp_path / "out")


def test_the_certificate(originals: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(originals["umt5"], tmp_path / "umt5"))
    edit_config(source, _name_or_path=str(tmp_path / "drafts"))
    convert(str(source), tmp_path / "out")
    certificate = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert certificate["schema"] == PARITY_SCHEMA
    assert (certificate["result"], certificate["differences"]) == ("same", [])
    assert certificate["source"] == {"name": "umt5", "revision": None}
    assert str(tmp_path) not in json.dumps(certificate)
    assert str(tmp_path) not in (tmp_path / "out" / "conversion.json").read_text()
    for result in certificate["models"]["implementations"]:
        assert result["logits_error"] <= result["bound"] == {"eager": 1e-5, "sdpa": 1e-4}[result["attn_implementation"]]
        assert result["greedy_identical"]


def test_without_hashes_or_source(out: Path) -> None:
    (out / "conversion.json").unlink()
    with pytest.raises(ConvertError, match="--against"):
        verify(out)


@pytest.mark.parametrize("against", [False, True])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_changed_settings(name: str, against: bool, out: Path, originals: dict[str, Path]) -> None:
    recorded = json.loads((out / "conversion.json").read_text())["files"]
    if name not in recorded:  # a toy without a tokenizer: an added file is as foreign as a changed one
        (out / name).write_text("{}")
    else:
        (out / name).write_text((out / name).read_text().replace("{", '{"temperature": 0.5, ', 1))
    found = verify(out, str(originals["t5-v1.1"]) if against else None)
    assert found["result"] == "different"
    assert any(name in difference for difference in found["differences"])


def test_generation_settings_of_the_config_are_carried_over(originals: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(originals["t5-v1.1"], tmp_path / "source"))
    (source / "generation_config.json").unlink(missing_ok=True)
    wanted = {"suppress_tokens": [5, 7], "repetition_penalty": 1.5, "min_length": 3}
    edit_config(source, **wanted)
    convert(str(source), tmp_path / "converted")
    written = json.loads((tmp_path / "converted" / "generation_config.json").read_text())
    assert {key: written[key] for key in wanted} == wanted


def test_a_kept_model_loads_in_the_dtype_that_its_source_states(originals: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(originals["t5-v1.1"], tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    mixed = {name: t if name == "shared.weight" else t.bfloat16() for name, t in tensors.items()}
    save_file(mixed, source / "model.safetensors", {"format": "pt"})
    for stated, expected in (("float32", "float32"), ("bfloat16", "bfloat16"), (None, "float32")):
        edit_config(source, dtype=stated)
        convert(str(source), tmp_path / f"{stated}", verify=False)
        assert json.loads((tmp_path / f"{stated}" / "config.json").read_text())["dtype"] == expected


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
@pytest.mark.parametrize("family", ["t5-v1.0", "umt5"])
def test_layer_streamed_verification_finds_what_whole_does(
    family: str, dtype: str, originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models too large for memory are run with one layer's weights at a time: the same figures."""
    whole = convert(str(originals[family]), tmp_path / "whole", dtype=dtype).parity
    monkeypatch.setattr(parity, "WHOLE_PARAMETERS", 0)
    monkeypatch.setattr(FlashT5ForConditionalGeneration, "from_pretrained", None)  # must not be needed
    streamed = convert(str(originals[family]), tmp_path / "streamed", dtype=dtype).parity
    assert whole is not None
    assert streamed is not None
    assert (whole["models"]["method"], streamed["models"]["method"]) == ("whole", "layer-streamed")
    for one, other in zip(streamed["models"]["implementations"], whole["models"]["implementations"], strict=True):
        for key in ("logits_error", "encoder_error", "largest_logit"):
            assert one[key] == other[key], "to the last bit"
        # Whole models compute their own loss, over padded rows.
        for key in ("loss", "oracle_loss"):
            assert one[key] == pytest.approx(other[key], rel=1e-6)
    if dtype == "bfloat16":
        assert streamed["models"]["rounding"]["quantiles"] == whole["models"]["rounding"]["quantiles"]
        assert streamed["models"]["in_own_dtype"] == whole["models"]["in_own_dtype"]


def test_layer_streamed_verification_notices(flan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "WHOLE_PARAMETERS", 0)
    load = parity._OwnWeights.__getitem__

    def load_with_an_error(weights: parity._OwnWeights, name: str) -> torch.Tensor:
        values = load(weights, name)
        return values + 0.5 if name == "decoder.block.1.ff_layer.wo.weight" else values

    monkeypatch.setattr(parity._OwnWeights, "__getitem__", load_with_an_error)
    with pytest.raises(DifferenceError, match="eager: logits_error"):
        convert(str(flan), tmp_path / "out")


def test_one_layer_of_weights_at_a_time(originals: dict[str, Path], tmp_path: Path) -> None:
    """After each layer its weights are gone again."""
    from fat5convert.probe import make_probe, run_probe
    from fat5convert.recognise import recognise
    from fat5convert.source import Checkpoint, local
    from fat5convert.stock_models import Weights, streamed_stock

    checkpoint = Checkpoint(local(originals["t5-v1.1"]))
    recognised = recognise(checkpoint)
    model = streamed_stock(recognised, Weights(checkpoint, recognised))
    most = 0

    def count(*_: object) -> None:
        nonlocal most
        most = max(most, sum(p.numel() for p in model.parameters() if p.device.type != "meta"))

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(count)
    run_probe(model, make_probe(recognised.config, recognised.layout), recognised.layout)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert most <= max(p.numel() for p in model.parameters())


def test_values_that_are_not_finite_are_named(flan: Path, tmp_path: Path) -> None:
    rewrite(flan, lambda tensors: tensors["lm_head.weight"][3].fill_(float("nan")))
    with pytest.raises(DifferenceError, match=r"not finite, so that nothing can be compared, in lm_head\.weight"):
        convert(str(flan), tmp_path / "out")
    assert not (tmp_path / "out").exists()
