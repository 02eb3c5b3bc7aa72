"""`attn_implementation="flash_attention_2"`: what it serves, what it refuses, and that it computes what eager does.

flash-attn runs on a GPU only. Elsewhere a stand-in with its documented signature takes its place, which computes in
plain torch what flash-attn documents: causal masks and ALiBi aligned at the last key, segments by `cu_seqlens`.
"""

import pytest
import torch
import transformers.modeling_utils
from model_parity import SHAPE, batch, relative_error
from position_kinds import KINDS, kind_model

import fat5.model.attention_mask
import fat5.model.flash_attention
from fat5.model import FlashT5Config, FlashT5ForConditionalGeneration
from fat5.model.attention_mask import AttentionMask

SERVED = ("none", "alibi", "rope", "xpos")


@pytest.fixture
def stand_in(monkeypatch):
    """Put plain torch where flash-attn would be, and count its calls."""
    calls = {"padded": 0, "packed": 0, "slopes": 0}

    def attend(q, k, v, softmax_scale, causal, alibi_slopes):  # [L, H, D]
        places = torch.arange(len(q))[:, None] + len(k) - len(q)
        distances = torch.arange(len(k))[None] - places
        scores = torch.einsum("qhd,khd->hqk", q, k) * softmax_scale
        if alibi_slopes is not None:
            assert alibi_slopes.dtype == torch.float32
            calls["slopes"] += 1
            scores = scores - alibi_slopes[:, None, None] * distances.abs()
        if causal:
            scores = scores.masked_fill(distances > 0, -torch.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, alibi_slopes=None):
        calls["padded"] += 1
        rows = [attend(*row, softmax_scale, causal, alibi_slopes) for row in zip(q, k, v, strict=True)]
        return torch.stack(rows)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False, alibi_slopes=None,
    ):  # fmt: skip
        calls["packed"] += 1
        output = torch.zeros_like(q)
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        for s in range(len(cu_seqlens_q) - 1):
            own, keys = slice(*cu_seqlens_q[s : s + 2]), slice(*cu_seqlens_k[s : s + 2])
            assert len(q[own]) <= max_seqlen_q
            assert len(k[keys]) <= max_seqlen_k
            if len(k[keys]):
                output[own] = attend(q[own], k[keys], v[keys], softmax_scale, causal, alibi_slopes)
        return output

    monkeypatch.setattr(fat5.model.flash_attention, "flash_attn_func", flash_attn_func, raising=False)
    monkeypatch.setattr(fat5.model.flash_attention, "flash_attn_varlen_func", flash_attn_varlen_func, raising=False)
    monkeypatch.setattr(fat5.model.flash_attention, "HAS_FLASH_ATTENTION", True)
    monkeypatch.setattr(fat5.model.attention_mask, "flash_serves", lambda *_: True)
    monkeypatch.setattr(
        transformers.modeling_utils, "lazy_import_flash_attention", lambda *_, **__: None, raising=False
    )
    return calls


def placed(place):
    inputs = batch(place if place in ("left", "right") else "none", 21, 13)
    if place in ("none", "segments"):
        del inputs["attention_mask"], inputs["decoder_attention_mask"]
    if place == "segments":
        for side, name in (("encoder", "input_ids"), ("decoder", "labels")):
            ids = torch.ones_like(inputs[name])
            ids[:, 4:], ids[:, 9:], ids[1:, 12:] = 2, 3, 0
            inputs[f"{side}_segment_ids"] = ids
        inputs["labels"][inputs["decoder_segment_ids"] == 0] = -100
    return inputs


@pytest.mark.parametrize("place", ["none", "left", "right", "segments"])
@pytest.mark.parametrize("kind", SERVED)
def test_a_model_equals_itself_on_eager(kind, place, stand_in, monkeypatch):
    inputs, gradients, logits = placed(place), {}, {}
    real = inputs["labels"] != -100
    for name in ("eager", "flash_attention_2"):
        model = kind_model(kind, name)
        if name != "eager":
            monkeypatch.setattr(AttentionMask, "build_dense", None)  # no matrix is made
        output = model(**inputs)
        output.loss.backward()
        logits[name] = output.logits[real]
        gradients[name] = {key: weight.grad for key, weight in model.named_parameters()}
    assert (stand_in["padded"], stand_in["packed"]) == ((6, 0) if place == "none" else (0, 6))
    assert bool(stand_in["slopes"]) == (kind == "alibi")
    assert relative_error(logits["flash_attention_2"], logits["eager"]) < 1e-5
    for name, gradient in gradients["eager"].items():
        assert relative_error(gradients["flash_attention_2"][name], gradient) < 1e-4, name


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("kind", ["alibi", "rope"])
def test_generates_the_same(kind, padding, stand_in):
    inputs = {name: value for name, value in batch(padding, 15, 4).items() if name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = kind_model(kind, "eager", tie_word_embeddings=False).generate(**inputs, **options)
    model = kind_model(kind, "flash_attention_2", tie_word_embeddings=False)
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert stand_in["padded"]


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("t5", {}, "cannot add T5's position bias"),
        ("fire", {}, "cannot add FIRE's position bias"),
        ("alibi_asymmetric", {}, "asymmetric ALiBi"),
        ("alibi", {"use_randomized_position_encoding": True}, "ALiBi of random positions"),
    ],
)
def test_biases_it_cannot_add_are_refused_by_name(kind, fields, reason, stand_in):
    config = FlashT5Config(**{**SHAPE, **KINDS[kind], **fields}, attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match=f"flash_attention_2.*{reason}.*eager"):
        FlashT5ForConditionalGeneration(config)
    model = kind_model(kind, **fields)
    with pytest.raises(ValueError, match=reason):
        model.set_attn_implementation("flash_attention_2")


@pytest.mark.skipif(fat5.model.flash_attention.HAS_FLASH_ATTENTION, reason="flash-attn is installed")
def test_without_the_package_it_says_what_to_install():
    with pytest.raises(ValueError, match=r"pip install 'fat5\[flash\]'"):
        kind_model("rope", "flash_attention_2")


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["none", "left", "right", "segments"])
@pytest.mark.parametrize("kind", SERVED)
def test_the_package_itself(kind, place):
    pytest.importorskip("flash_attn")
    shape = {"num_heads": 4, "d_kv": 64, "d_model": 128, "d_ff": 256}
    inputs = {name: value.cuda() for name, value in placed(place).items()}
    real = inputs["labels"] != -100
    results = {}
    for name, dtype in (("eager", torch.float32), ("eager", torch.bfloat16), ("flash_attention_2", torch.bfloat16)):
        model = kind_model(kind, name, **shape).cuda().to(dtype)
        output = model(**inputs)
        output.loss.backward()
        weight = model.encoder.block[0].self_attention_layer.self_attention.Wq.weight
        results[name, dtype] = output.logits[real].float(), weight.grad.float()
    exact = results["eager", torch.float32]
    for i in range(2):
        error = (results["flash_attention_2", torch.bfloat16][i] - exact[i]).norm()
        assert error < 2 * (results["eager", torch.bfloat16][i] - exact[i]).norm() + 1e-3 * exact[i].norm()
