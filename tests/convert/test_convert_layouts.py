"""Checkpoints of every publisher, in their true layout: encoders, single files, other names, other fields."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from toy_checkpoints import all_tensors, edit_config, make_model, rewrite, write_checkpoint
from toy_layouts import (
    encoder_tensors,
    make_encoder,
    write_config,
    write_image_model,
    write_published_fat5,
    write_wan,
)
from transformers import AutoModelForTextEncoding

from fat5.model import FlashT5EncoderModel, FlashT5ForConditionalGeneration
from fat5convert.cli import main
from fat5convert.convert import convert, plan_conversion
from fat5convert.errors import ConvertError
from fat5convert.families import VARIANTS

IDS = torch.arange(2, 82).reshape(2, 40)
MASK = torch.ones_like(IDS).index_fill(1, torch.arange(30, 40), 0)

# Title, what its config says beyond the toy's sizes, and the toy that it is made from.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "UL2": ("t5-v1.1", {"feed_forward_proj": "gated-silu", "d_kv": 256, "num_heads": 2, "spread": 0.05}),
    "CodeT5": ("t5-v1.0", {"bos_token_id": 1, "eos_token_id": 2}),
    "ProtT5": ("t5-v1.0", {"vocab_size": 128}),
    "Ankh": ("t5-v1.1", {"relative_attention_num_buckets": 64, "vocab_size": 144}),
    "Chronos-T5": ("t5-v1.0", {"chronos_config": {"n_tokens": 4096}, "vocab_size": 4096, "d_model": 8}),
    "MADLAD-400": ("t5-v1.1", {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}),
    "Pile-T5": ("umt5", {"eos_token_id": 2, "pad_token_id": 1}),
    "T5 v1.0": ("t5-v1.0", {"num_layers": 1, "num_decoder_layers": 1, "d_ff": 8}),  # t5-efficient: any shape
}


@pytest.mark.parametrize("title", CONFIGS)
def test_variants_by_their_config(title: str, tmp_path: Path) -> None:
    toy, changes = CONFIGS[title]
    source = write_checkpoint(tmp_path / "source", toy, **changes)
    if title == "Pile-T5":
        edit_config(source, model_type="umt5")
    if title == "MADLAD-400":  # holds the embedding under the decoder's name alone
        rewrite(source, lambda t: t.update({"decoder.embed_tokens.weight": t.pop("shared.weight")}))
    report = convert(str(source), tmp_path / "out")
    assert report.plan.recognised.title == title
    for name in ("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id", "d_kv"):
        if name in changes:
            assert json.loads((tmp_path / "out" / "config.json").read_text())[name] == changes[name]


def test_every_title_is_tested() -> None:
    elsewhere = {"ByT5", "T5 v1.1", "mT5", "umT5", "FAT5"}
    assert {variant.title for variant in VARIANTS} == elsewhere | set(CONFIGS)


@pytest.mark.parametrize("rows", [250112, 250100])
def test_the_rows_of_mt5(rows: int, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "mt5", vocab_size=rows, d_model=4, d_ff=8, num_layers=1)
    report = convert(str(source), tmp_path / "out", verify=False)
    assert report.plan.recognised.title == "mT5"
    assert report.plan.outputs["lm_head.weight"].shape == (rows, 4)


def encoders_agree(stock: Any, out: Path) -> None:
    """The converted encoder computes what the stock encoder does, by whichever class it is loaded."""
    with torch.no_grad():
        expected = stock(input_ids=IDS, attention_mask=MASK).last_hidden_state[MASK == 1]
        ours = FlashT5EncoderModel.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
        got = ours(input_ids=IDS, attention_mask=MASK).last_hidden_state[MASK == 1]
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("model_type", ["t5", "umt5"])
def test_a_folder_with_an_encoder_alone(model_type: str, tmp_path: Path) -> None:
    """As image models keep T5-XXL: sharded, nothing but the encoder and `shared`."""
    stock = make_encoder(model_type)
    stock.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 2
    report = convert(str(tmp_path / "source"), tmp_path / "out")
    assert report.plan.recognised.title == {"t5": "T5 v1.1 encoder", "umt5": "umT5 encoder"}[model_type]
    assert report.parity is not None
    assert report.parity["models"]["compared"] == "encoder states"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["FlashT5EncoderModel"]
    assert config["auto_map"]["AutoModel"].endswith(".FlashT5EncoderModel")
    assert "AutoModelForSeq2SeqLM" not in config["auto_map"]
    encoders_agree(stock, tmp_path / "out")
    loaded = AutoModelForTextEncoding.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__name__ == "FlashT5EncoderModel"


def test_prot_t5_half_precision_encoder(tmp_path: Path) -> None:
    stock = make_encoder(vocab_size=128, feed_forward_proj="relu", tie_word_embeddings=True).half()
    stock.save_pretrained(tmp_path / "source")
    report = convert(str(tmp_path / "source"), tmp_path / "out")
    assert report.plan.recognised.title == "ProtT5 encoder"
    assert {str(info.dtype) for info in report.plan.outputs.values()} == {"torch.float16"}
    encoders_agree(stock.float(), tmp_path / "out")


def test_half_a_model_is_no_encoder(flan: Path, tmp_path: Path) -> None:
    rewrite(flan, lambda t: [t.pop(name) for name in list(t) if name.startswith(("decoder.", "lm_head"))])
    with pytest.raises(ConvertError, match="missing tensor"):
        convert(str(flan), tmp_path / "out")


@pytest.mark.parametrize("embed_tokens", [False, True])
def test_the_single_file_of_an_image_model(embed_tokens: bool, tmp_path: Path) -> None:
    stock = make_encoder().half()
    path = write_image_model(tmp_path / "sd3.safetensors", stock, embed_tokens=embed_tokens)
    config = write_config(tmp_path / "t5.json", stock)
    report = convert(str(path), tmp_path / "out", config=str(config))
    assert report.conversion["leftovers"].keys() >= {"model.*", "first_stage_model.*", "text_encoders.*"}
    assert report.conversion["source"] == {"name": "sd3.safetensors", "revision": None, "files": ["sd3.safetensors"]}
    assert ("text_encoders.t5xxl.transformer.encoder.embed_tokens.weight" in report.conversion["leftovers"]) == (
        embed_tokens
    )
    encoders_agree(stock.float(), tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_fp8_becomes_bfloat16_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    stock = make_encoder()
    path = write_image_model(tmp_path / "fp8.safetensors", stock, embed_tokens=False, dtype=dtype)
    report = convert(str(path), tmp_path / "out", config=str(write_config(tmp_path / "t5.json", stock)))
    stored, written = load_file(path), all_tensors(tmp_path / "out")
    for name, facts in report.conversion["tensors"].items():
        assert written[name].dtype == torch.bfloat16
        assert torch.equal(written[name].float(), stored[facts["source"]].float())
        assert facts["source_dtype"].startswith("float8")


@pytest.mark.parametrize("scale", ["scaled_fp8", "encoder.block.0.layer.0.SelfAttention.q.scale_weight"])
def test_fp8_with_scales_is_refused(scale: str, tmp_path: Path) -> None:
    stock = make_encoder()
    tensors = {name: t.to(torch.float8_e4m3fn) for name, t in encoder_tensors(stock).items()}
    save_file(tensors | {scale: torch.tensor([0.37])}, tmp_path / "t5xxl_fp8_scaled.safetensors")
    config = str(write_config(tmp_path / "t5.json", stock))
    with pytest.raises(ConvertError, match=r"fp8 weights with scales.*fp16 or bf16 file"):
        convert(str(tmp_path / "t5xxl_fp8_scaled.safetensors"), tmp_path / "out", config=config)


def test_wan_names_its_umt5_otherwise(tmp_path: Path) -> None:
    stock = make_encoder("umt5").bfloat16()
    path = write_wan(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth", stock)
    config = str(write_config(tmp_path / "umt5.json", stock))
    report = convert(str(path), tmp_path / "out", config=config)
    assert report.plan.recognised.title == "umT5 encoder"
    assert report.conversion["tensors"]["shared.weight"]["source"] == "token_embedding.weight"
    encoders_agree(stock.float(), tmp_path / "out")
    verified = CliRunner().invoke(
        main, ["verify", str(tmp_path / "out"), "--against", str(path), "--config", config], catch_exceptions=False
    )
    assert verified.exit_code == 0, verified.output


def test_the_config_of_a_single_file_is_checked(tmp_path: Path) -> None:
    stock = make_encoder()
    save_file(encoder_tensors(stock), tmp_path / "t5.safetensors")
    with pytest.raises(ConvertError, match=r"--config t5-v1_1-xxl.*missing tensor.*the config asks for"):
        convert(str(tmp_path / "t5.safetensors"), tmp_path / "out", config="t5-v1_1-xxl")
    with pytest.raises(
        ConvertError, match=r"shared.weight in t5.safetensors has shape \[120, 32\], the config asks for \[32128, 512\]"
    ):
        plan_conversion(
            str(tmp_path / "t5.safetensors"), config=str(_config_of("t5-v1_1-small", tmp_path, num_layers=3))
        )
    with pytest.raises(ConvertError, match=r"no known name.*umt5-xxl"):
        convert(str(tmp_path / "t5.safetensors"), tmp_path / "out", config="t6")
    assert not (tmp_path / "out").exists()


def _config_of(name: str, folder: Path, **changes: Any) -> Path:
    from fat5convert.known_configs import find_config

    (folder / "edited.json").write_text(json.dumps(find_config(name) | changes))
    return folder / "edited.json"


@pytest.mark.parametrize("name", ["t5-small", "t5-v1_1-small", "mt5-small", "umt5-small"])
def test_known_configs_describe_the_models_of_that_name(name: str) -> None:
    """Their parameter counts, as the Hub states them."""
    from transformers import (
        MT5Config,
        MT5ForConditionalGeneration,
        T5Config,
        T5ForConditionalGeneration,
        UMT5Config,
        UMT5ForConditionalGeneration,
    )

    from fat5convert.known_configs import KNOWN_CONFIGS

    classes: dict[str, Any] = {
        "t5": (T5Config, T5ForConditionalGeneration),
        "mt5": (MT5Config, MT5ForConditionalGeneration),
        "umt5": (UMT5Config, UMT5ForConditionalGeneration),
    }
    raw = KNOWN_CONFIGS[name]
    config_class, model_class = classes[raw["model_type"]]
    with torch.device("meta"):
        model = model_class(config_class(**raw))
    count = sum(p.numel() for p in model.parameters())
    if raw.get("tie_word_embeddings") is False:  # current transformers ties all the same, and counts the head once
        count += raw["vocab_size"] * raw["d_model"]
    assert (
        count
        == {
            "t5-small": 60_506_624,
            "t5-v1_1-small": 76_961_152,
            "mt5-small": 300_176_768,
            "umt5-small": 306_601_984,
        }[name]
    )


SENTENCE_MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]


def write_sentence_t5(folder: Path) -> Any:
    stock = make_encoder(feed_forward_proj="relu", tie_word_embeddings=True)
    stock.save_pretrained(folder)
    (folder / "modules.json").write_text(json.dumps(SENTENCE_MODULES))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 256}')
    for module in ("1_Pooling", "2_Dense"):
        (folder / module).mkdir()
        (folder / module / "config.json").write_text("{}")
    torch.save({"linear.weight": torch.arange(12.0).reshape(3, 4)}, folder / "2_Dense" / "pytorch_model.bin")
    return stock


def test_sentence_t5_keeps_its_dense_layer(tmp_path: Path) -> None:
    stock = write_sentence_t5(tmp_path / "source")
    report = convert(str(tmp_path / "source"), tmp_path / "out")
    encoders_agree(stock, tmp_path / "out")
    out = tmp_path / "out"
    assert json.loads((out / "modules.json").read_text()) == SENTENCE_MODULES
    dense = load_file(out / "2_Dense" / "model.safetensors")
    assert torch.equal(dense["linear.weight"], torch.arange(12.0).reshape(3, 4))
    assert not list(out.rglob("*.bin"))
    assert "2_Dense/model.safetensors" in report.conversion["modules"]
    from fat5convert.verify import verify

    assert verify(out)["result"] == "same"
    save_file({"linear.weight": torch.zeros(3, 4)}, out / "2_Dense" / "model.safetensors")
    assert "2_Dense/model.safetensors" in verify(out)["differences"][0]


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", 3, ".hidden"])
def test_sentence_modules_leading_elsewhere(path: object, tmp_path: Path) -> None:
    write_sentence_t5(tmp_path / "source")
    (tmp_path / "source" / "modules.json").write_text(json.dumps([{"path": path}]))
    with pytest.raises(ConvertError, match=r"modules\.json"):
        convert(str(tmp_path / "source"), tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", [1.0, None])
def test_published_fat5(scale: float | None, originals: dict[str, Path], tmp_path: Path) -> None:
    """Null means 1/sqrt(num_heads) there; the oracle is stock T5 with queries multiplied by it."""
    source = write_published_fat5(tmp_path / "source", originals["t5-v1.1"], attention_scale=scale)
    (source / "generation_config.json").write_text('{"pad_token_id": -100, "num_beams": 2}')
    report = convert(str(source), tmp_path / "out")
    assert report.plan.recognised.title == "FAT5"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["pad_token_id"], generation["num_beams"]) == (0, 2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["feed_forward_proj"] == "gated-gelu"
    assert (config["pad_token_id"], config["decoder_start_token_id"]) == (0, 0)
    assert config["is_encoder_decoder"] is True
    assert "use_glu_mlp" not in config
    assert "must not run" not in (tmp_path / "out" / "modeling_flash_t5.py").read_text()
    stock = make_model("t5-v1.1")
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if name.endswith("Attention.q.weight") and scale is None:
                parameter.mul_(3**-0.5)
        expected = stock(input_ids=IDS, labels=IDS[:, :9].contiguous()).logits
        ours = FlashT5ForConditionalGeneration.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
        got = ours(input_ids=IDS, labels=IDS[:, :9].contiguous()).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_glu_mlp": False}, "missing tensor.*wi.weight"),
        ({"attention_scale": "a third"}, "attention_scale"),
    ],
)
def test_published_fat5_that_does_not_convert(
    changes: dict[str, Any], message: str, originals: dict[str, Path], tmp_path: Path
) -> None:
    source = write_published_fat5(tmp_path / "source", originals["t5-v1.1"], **changes)
    with pytest.raises(ConvertError, match=message):
        convert(str(source), tmp_path / "out")


def test_a_null_pad_token(flan: Path, tmp_path: Path) -> None:
    path = flan / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"pad_token_id": None, "decoder_start_token_id": None}))
    report = convert(str(flan), tmp_path / "out")
    assert report.parity is not None
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] is None
    shutil.rmtree(tmp_path / "out")


def test_aliases_recorded_in_the_metadata(originals: dict[str, Path], tmp_path: Path) -> None:
    """Safetensors keeps one of several names for the same tensor, and may note the others: here the embedding's."""
    source = Path(shutil.copytree(originals["t5-v1.0"], tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    kept = "decoder.embed_tokens.weight"
    tensors[kept] = tensors.pop("shared.weight")
    aliases = {name: kept for name in ("shared.weight", "encoder.embed_tokens.weight", "lm_head.weight")}
    save_file(tensors, source / "model.safetensors", {"format": "pt", **aliases})
    report = convert(str(source), tmp_path / "out", verify=False)
    assert report.plan.recognised.layout.tied
    written = all_tensors(tmp_path / "out")
    assert "lm_head.weight" not in written
    assert torch.equal(written["shared.weight"], tensors[kept])
