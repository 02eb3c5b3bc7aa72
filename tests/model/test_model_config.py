"""The configuration: T5's defaults, JSON and back, the published FAT5 fields, and what is refused."""

import json

import pytest
import torch
from model_parity import SHAPE
from transformers import AutoConfig, T5Config
from transformers.activations import ACT2FN

from fat5.model import AUTO_MAP, FlashT5Config, FlashT5ForConditionalGeneration


def test_defaults_are_those_of_t5():
    ours, stock = FlashT5Config(), T5Config()
    for name in (
        "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads",
        "relative_attention_num_buckets", "relative_attention_max_distance", "dropout_rate", "layer_norm_epsilon",
        "initializer_factor", "feed_forward_proj", "is_encoder_decoder", "use_cache", "pad_token_id", "eos_token_id",
        "classifier_dropout", "tie_word_embeddings", "is_gated_act", "dense_act_fn",
        "hidden_size", "num_attention_heads", "num_hidden_layers", "head_dim",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(stock, name), name
    assert (ours.decoder_start_token_id, ours.bos_token_id) == (0, None)
    assert (ours.relative_attention_per_layer, ours.softmax_scale) == (False, 1.0)
    assert (ours.scale_decoder_outputs, FlashT5Config(tie_word_embeddings=False).scale_decoder_outputs) == (True, False)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": False, "feed_forward_proj": "gated-silu", "num_decoder_layers": 2, "num_layers": 5},
        {"tie_word_embeddings": True, "scale_decoder_outputs": False, "relative_attention_per_layer": True},
        {"attention_scale": None, "eos_token_id": [1, 2], "bos_token_id": 1, "pad_token_id": 7, "use_cache": False},
        {"decoder_start_token_id": 4, "relative_attention_num_buckets": 64, "dropout_rate": 0.0, "num_labels": 5},
    ],
)
def test_json_round_trip(tmp_path, fields):
    config = FlashT5Config(**fields)
    for name, value in fields.items():
        assert getattr(config, name) == value
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "flash_t5"
    assert written["auto_map"] == AUTO_MAP
    documented = (
        "vocab_size d_model d_kv d_ff num_layers num_decoder_layers num_heads relative_attention_num_buckets "
        "relative_attention_max_distance relative_attention_per_layer position_encoding_type attention_scale "
        "feed_forward_proj dropout_rate layer_norm_epsilon initializer_factor tie_word_embeddings "
        "alibi_mode rotary_emb_fraction rotary_base rotary_interleaved rotary_scale_base fire_mlp_width "
        "use_randomized_position_encoding max_sequence_length head_reads_decoder classifier_dropout "
        "scale_decoder_outputs pad_token_id eos_token_id decoder_start_token_id is_encoder_decoder"
    )
    for name in documented.split():
        if name == "tie_word_embeddings" and config.tie_word_embeddings:
            continue  # transformers 4 leaves out its own default, which is True; so is ours
        assert written[name] == getattr(config, name), name
    again = FlashT5Config.from_pretrained(tmp_path)
    assert again.to_diff_dict() == config.to_diff_dict()
    assert FlashT5Config(**json.loads(config.to_json_string())).to_diff_dict() == config.to_diff_dict()
    assert AutoConfig.from_pretrained(tmp_path, trust_remote_code=True).to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize(
    ("published", "expected"),
    [
        ({"use_glu_mlp": True, "use_gelu_act": True}, "gated-gelu"),
        ({"use_glu_mlp": True, "use_gelu_act": False}, "gated-relu"),
        ({"use_glu_mlp": False, "use_gelu_act": True}, "gelu_new"),
        ({"use_glu_mlp": False, "use_gelu_act": False}, "relu"),
        ({"use_glu_mlp": True}, "gated-gelu"),
        ({"use_gelu_act": False}, "relu"),
        ({}, "gated-silu"),
    ],
)
def test_published_fields_replace_the_stale_feed_forward(published, expected):
    config = FlashT5Config(feed_forward_proj="gated-silu", **published)
    assert config.feed_forward_proj == expected
    assert config.dense_act_fn in ACT2FN
    assert not set(published) & set(config.to_dict())


def test_positions_are_spelt_as_published_or_rightly():
    for spelling in ("symetric", "symmetric"):
        assert FlashT5Config(alibi_mode=spelling).alibi_mode == "symmetric"
    for spelling in ("asymetric", "asymmetric"):
        assert FlashT5Config(alibi_mode=spelling).alibi_mode == "asymmetric"
    assert FlashT5Config(position_encoding_type="alibi").position_encoding_type == "ALiBi"
    assert FlashT5Config(position_encoding_type=None).position_encoding_type == "none"


def test_published_conventions():
    config = FlashT5Config(num_heads=4, attention_scale=None, pad_token_id=-100, is_encoder_decoder=False)
    assert config.softmax_scale == 0.5
    assert (config.pad_token_id, config.decoder_start_token_id, config.is_encoder_decoder) == (0, 0, True)
    assert FlashT5Config(pad_token_id=-100, decoder_start_token_id=5).pad_token_id == 5


def test_attention_scale_is_applied():
    """Scaling QK^T by 1/2 is the same as halving Wq."""
    model = FlashT5ForConditionalGeneration(FlashT5Config(**SHAPE, attention_scale=None)).eval()
    inputs = {"input_ids": torch.arange(2, 12)[None], "labels": torch.arange(3, 9)[None]}
    with torch.no_grad():
        expected = model(**inputs).logits
        plain = FlashT5ForConditionalGeneration(FlashT5Config(**SHAPE)).eval()
        plain.load_state_dict(model.state_dict())
        assert not torch.allclose(plain(**inputs).logits, expected, atol=1e-6)
        for name, weight in plain.named_parameters():
            if name.endswith("Wq.weight"):
                weight.mul_(0.5)
        torch.testing.assert_close(plain(**inputs).logits, expected)


def test_gelu_with_a_gate_is_the_tanh_approximation_and_without_is_exact():
    assert FlashT5Config(feed_forward_proj="gated-gelu").dense_act_fn == "gelu_new"
    assert FlashT5Config(feed_forward_proj="gelu").dense_act_fn == "gelu"


def test_decoder_view_counts_the_layers_of_the_decoder():
    config = FlashT5Config(num_layers=6, num_decoder_layers=2)
    assert config.get_text_config(decoder=True).num_hidden_layers == 2
    assert config.get_text_config() is config
    assert config.get_text_config(encoder=True).num_hidden_layers == 6


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"d_model": -8}, "d_model"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_heads": 2.5}, "num_heads"),
        ({"num_layers": True}, "num_layers"),
        ({"num_decoder_layers": 0}, "num_decoder_layers"),
        ({"d_ff": "512"}, "d_ff"),
        ({"dropout_rate": 1.0}, "dropout_rate"),
        ({"dropout_rate": -0.1}, "dropout_rate"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon"),
        ({"initializer_factor": -1.0}, "initializer_factor"),
        ({"attention_scale": 0.0}, "attention_scale"),
        ({"feed_forward_proj": "gated-swishy"}, "gated-swishy"),
        ({"feed_forward_proj": "gated"}, "gated"),
        ({"feed_forward_proj": "gelu-gated-x"}, "gelu-gated-x"),
        ({"position_encoding_type": "learned"}, "learned"),
        ({"alibi_mode": "left"}, "alibi_mode"),
        ({"position_encoding_type": "ALiBi", "alibi_mode": "asymetric", "num_heads": 3}, "num_heads"),
        ({"rotary_base": 0}, "rotary_base"),
        ({"rotary_scale_base": -1.0}, "rotary_scale_base"),
        ({"rotary_emb_fraction": 1.5}, "rotary_emb_fraction"),
        ({"position_encoding_type": "RoPE", "d_kv": 6, "rotary_emb_fraction": 0.5}, "rotary_emb_fraction"),
        ({"fire_mlp_width": 0}, "fire_mlp_width"),
        ({"max_sequence_length": 0}, "max_sequence_length"),
        ({"relative_attention_num_buckets": 2}, "relative_attention_num_buckets"),
        ({"relative_attention_max_distance": 16}, "relative_attention_max_distance"),
    ],
)
def test_nonsense_is_refused_by_name(fields, named):
    with pytest.raises(ValueError, match=named):
        FlashT5Config(**fields)


@pytest.mark.parametrize(
    ("implementation", "reason"),
    [
        ("flash_attention_2", "cannot add T5's position bias"),
        ("flex_attention", "does not exist"),
        ("nonsense", "does not exist"),
    ],
)
def test_attention_implementations_that_do_not_exist_are_refused(implementation, reason):
    with pytest.raises(ValueError, match=f"{implementation}.*{reason}.*eager, sdpa, fat5, flash_attention_2"):
        FlashT5ForConditionalGeneration(FlashT5Config(**SHAPE, attn_implementation=implementation))


def test_default_attention_is_fat5():
    model = FlashT5ForConditionalGeneration(FlashT5Config(**SHAPE))
    assert model.config._attn_implementation == "fat5"
    assert model.encoder.block[1].self_attention_layer.self_attention.config is model.config
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa"
