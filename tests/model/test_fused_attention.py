"""A model on `fat5` attention equals itself on `eager`: logits and every gradient, whatever is masked.

Both are compared with eager in fp64: the scores of these models are large, so that rounding shows in deep gradients.
Without a GPU the tests that need kernels run in a process that interprets them, at toy sizes; with one, at real sizes.
"""

import copy
import gc
import subprocess
import sys

import pytest
import torch
from interpreter import DEVICE, HAS_KERNELS, INTERPRETED, needs_kernels, run_interpreted
from model_parity import batch, build_flash, build_stock, relative_error
from transformers import AutoModelForSeq2SeqLM

import fat5.model.attention
from fat5.model.attention_mask import AttentionMask

SMALL = {"num_heads": 2, "d_kv": 6}
REAL = {"num_heads": 8, "d_kv": 64, "d_model": 256, "d_ff": 512, "relative_attention_max_distance": 128}
SHAPE = SMALL if not HAS_KERNELS or INTERPRETED else REAL
LENGTHS = (21, 13, 2) if SHAPE is SMALL else (613, 389, 3)
LOGITS, GRADIENTS = 1e-5, 2e-5
"""Rounding floors, as a share of the largest value, on top of twice the error of eager in the same dtype."""


def test_in_the_interpreter():
    run_interpreted(__file__)


@pytest.mark.slow
def test_the_long_ones_in_the_interpreter():
    run_interpreted(__file__, "slow")


FAMILY = "t5" if SHAPE is SMALL else "t5_v1_1"
"""At real size some inner value lies so near to relu's kink that rounding decides about its whole gradient."""


def pair(family=FAMILY, **overrides):
    """The same weights on eager and on fat5."""
    stock = build_stock(family, **SHAPE, **overrides)
    return [build_flash(family, stock, name, **SHAPE, **overrides).to(DEVICE) for name in ("eager", "fat5")]


def inputs_of(kind):
    """A batch whose padding is of one kind, on the device; labels only where the decoder has real tokens."""
    inputs = batch(kind if kind in ("none", "right", "left") else "none", *LENGTHS)
    if kind == "stream":  # the rows one behind the other, cut elsewhere
        inputs = {name: inputs[name].reshape(1, -1) for name in ("input_ids", "labels")}
        for side, name in (("encoder", "input_ids"), ("decoder", "labels")):
            length = inputs[name].shape[1]
            ends = [0, length // 5, length // 2, length // 2 + 1, length]
            inputs[f"{side}_cu_seqlens"] = torch.tensor(ends).to(DEVICE)
            inputs[f"{side}_max_length"] = length - ends[3]
            inputs[name] = inputs[name].to(DEVICE)
        return inputs
    rows, length = inputs["input_ids"].shape
    generator = torch.Generator().manual_seed(3)
    if kind in ("holes", "cross_holes"):
        inputs["attention_mask"] = (torch.rand(rows, length, generator=generator) < 0.7).long()
    if kind == "cross_holes":  # the encoder does not see these, only cross-attention does
        inputs["encoder_outputs"] = (torch.randn(rows, length, SHAPE.get("d_model", 32), generator=generator),)
        del inputs["input_ids"]
    if kind in ("segments", "decoder_holes"):
        hidden = torch.rand(inputs["labels"].shape, generator=generator) < 0.3
        inputs["decoder_attention_mask"] = (~hidden).long()
    if kind == "segments":
        for name, size in (("encoder", length), ("decoder", inputs["labels"].shape[1])):
            cuts = [[0.3, 0.55, 0.9], [0.5, 0.6, 1.0], [0.1, 0.4, 0.8]][:rows]
            ends = (torch.tensor(cuts) * size).long()[:, None, :]  # [B, 1, n]
            ids = 1 + (torch.arange(size)[None, :, None] >= ends).sum(-1)
            inputs[f"{name}_segment_ids"] = ids % 4  # what follows the third segment is padding
        del inputs["attention_mask"], inputs["decoder_attention_mask"]
        inputs["labels"][inputs["decoder_segment_ids"] == 0] = -100
    elif kind != "none":
        inputs["labels"][inputs["decoder_attention_mask"] == 0] = -100
    else:
        del inputs["attention_mask"], inputs["decoder_attention_mask"]
    return {
        name: tuple(x.to(DEVICE) for x in value) if isinstance(value, tuple) else value.to(DEVICE)
        for name, value in inputs.items()
    }


@pytest.fixture
def paths(monkeypatch):
    """How often a layer ran on the kernels, and how often a stack fell back to a matrix."""
    counts = {"fused": 0, "dense": 0}
    fused, dense = fat5.model.attention.fused_attention, AttentionMask.build_dense

    def count_fused(*arguments):
        counts["fused"] += 1
        return fused(*arguments)

    def count_dense(mask):
        counts["dense"] += 1
        return dense(mask)

    monkeypatch.setattr(fat5.model.attention, "fused_attention", count_fused)
    monkeypatch.setattr(AttentionMask, "build_dense", count_dense)
    return counts


def gradients(model, inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def in_double(inputs):
    """The same batch for a model in fp64."""
    return {name: tuple(x.double() for x in value) if isinstance(value, tuple) else value
            for name, value in inputs.items()}  # fmt: skip


def assert_same(fused, eager, inputs):
    """Loss, logits and every gradient as near to fp64 as those of eager."""
    exact, exact_grads = gradients(copy.deepcopy(eager).double(), in_double(inputs))
    (output, grads), (plain, plain_grads) = gradients(fused, inputs), gradients(eager, inputs)
    real = inputs["labels"] != -100
    assert output.loss.item() == pytest.approx(exact.loss.item(), rel=LOGITS)
    if output.logits is not None:  # training on a GPU does without
        rounding = relative_error(plain.logits[real], exact.logits[real])
        assert relative_error(output.logits[real], exact.logits[real]) < 2 * rounding + LOGITS
    assert grads.keys() == exact_grads.keys()
    for name, gradient in exact_grads.items():
        allowed = 2 * relative_error(plain_grads[name], gradient) + GRADIENTS
        assert relative_error(grads[name], gradient) < allowed, name


CASES = {  # kind of batch: attentions on the kernels, of two in the encoder, one in the decoder and one across
    "none": 4,
    "right": 4,
    "left": 4,
    "segments": 4,
    "stream": 4,
    "holes": 2,
    "cross_holes": 2,
    "decoder_holes": 3,
}


LONG = ("none", "left", "segments", "decoder_holes")


@needs_kernels
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in LONG)) for kind in CASES])
def test_logits_and_gradients(kind, paths):
    eager, fused = pair(num_decoder_layers=1)
    inputs = inputs_of(kind)
    fused(**inputs)
    assert paths == {"fused": CASES[kind], "dense": kind in ("holes", "decoder_holes")}
    assert_same(fused, eager, inputs)


@needs_kernels
@pytest.mark.slow
def test_a_table_for_each_layer(paths):
    eager, fused = pair("umt5", num_decoder_layers=1)
    assert_same(fused, eager, inputs_of("right"))
    assert paths["fused"] == 4


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    eager, fused = pair(num_layers=2, num_decoder_layers=1)
    fused.train()
    fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fused.enable_input_require_grads()
    assert_same(fused, eager, inputs_of("left"))


@needs_kernels
def test_published_scale_reaches_the_kernels():
    stock = build_stock("t5", **SHAPE)
    eager, fused = (
        build_flash("t5", stock, name, **SHAPE, attention_scale=0.3).to(DEVICE) for name in ("eager", "fat5")
    )
    inputs = inputs_of("right")
    real = inputs["labels"] != -100
    with torch.no_grad():
        assert relative_error(fused(**inputs).logits[real], eager(**inputs).logits[real]) < LOGITS


@needs_kernels
def test_dropout_in_training_only(monkeypatch):
    _, fused = pair(num_layers=1, dropout_rate=0.4)
    rates = []
    attend = fat5.model.attention.fused_attention

    def record(*arguments):
        rates.append(arguments[-1])
        return attend(*arguments)

    monkeypatch.setattr(fat5.model.attention, "fused_attention", record)
    inputs = inputs_of("none")
    with torch.no_grad():
        fused(**inputs)
        fused.train()(**inputs)
    assert rates == [0.0] * 3 + [0.4] * 3


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), [("t5", "left"), ("umt5", "right")])
def test_greedy_decoding(family, kind, paths):
    eager, fused = pair(family)
    inputs = inputs_of(kind)
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = eager.generate(**given, **options)
    paths.update(fused=0, dense=0)
    assert torch.equal(fused.generate(**given, **options), expected)
    # the encoder, the first step, then three in which one query needs but a row of a matrix, of itself and across
    assert paths == {"fused": 6, "dense": 6}
    assert torch.equal(fused.generate(**given, **options, cache_implementation="static"), expected)


@needs_kernels
@pytest.mark.slow
def test_decoder_prompt_with_padding_on_the_left():
    eager, fused = pair()
    inputs = inputs_of("left")
    del inputs["labels"]
    first = (inputs["decoder_attention_mask"] == 0).sum(1)
    inputs["decoder_input_ids"][range(len(first)), first] = 0  # the start token, which `generate` would prepend
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(fused.generate(**inputs, **options), eager.generate(**inputs, **options))


@needs_kernels
def test_cached_chunks_equal_one_call():
    _, fused = pair()
    inputs = inputs_of("right")
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    ids, cache, pieces = inputs["decoder_input_ids"], None, []
    with torch.no_grad():
        expected = fused(**given, decoder_input_ids=ids, use_cache=False).logits
        for chunk in ids.split([ids.shape[1] - 4, 3, 1], dim=1):
            output = fused(**given, decoder_input_ids=chunk, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
    assert relative_error(torch.cat(pieces, dim=1), expected) < LOGITS


@needs_kernels
def test_attention_weights_come_from_eager(paths):
    eager, fused = pair()
    inputs = inputs_of("none")
    with torch.no_grad():
        expected, actual = (model(**inputs, output_attentions=True) for model in (eager, fused))
    assert paths["fused"] == 0
    for one, two in zip(actual.decoder_attentions, expected.decoder_attentions, strict=True):
        assert torch.equal(one, two)


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "right"])
def test_compiles_to_one_graph(kind, paths):
    eager, fused = pair(num_layers=1)
    inputs = inputs_of(kind)
    torch.compiler.reset()
    fused.compile(fullgraph=True, backend="aot_eager")
    assert_same(fused, eager, inputs)


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["right", "left"])
def test_rows_of_nothing_but_padding(kind):
    eager, fused = pair(num_layers=1)
    inputs = inputs_of(kind)
    inputs["attention_mask"][-1] = 0
    inputs["labels"][-1] = -100
    assert_same(fused, eager, inputs)
    assert all(parameter.grad.isfinite().all() for parameter in fused.parameters())


@needs_kernels
@pytest.mark.slow
def test_a_repository_runs_its_own_kernels_beside_those_of_the_package(tmp_path):
    _, fused = pair(num_layers=1)
    fused.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, trust_remote_code=True, attn_implementation="fat5").to(
        DEVICE
    )
    assert loaded.config._attn_implementation == "fat5"
    assert type(loaded) is not type(fused)
    inputs = inputs_of("right")
    for _ in range(2):
        (output, grads), (expected, expected_grads) = gradients(loaded, inputs), gradients(fused, inputs)
        assert relative_error(output.logits, expected.logits) < 1e-6
        assert all(relative_error(grads[name], expected_grads[name]) < 1e-5 for name in expected_grads)


WITHOUT_TRITON = """
import sys
import torch

sys.modules.update(triton=None, fat5=None)  # as where they are not installed
from transformers import AutoModelForSeq2SeqLM

model = AutoModelForSeq2SeqLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, attn_implementation="fat5"
).eval()
assert model.config._attn_implementation == "fat5"
ids = torch.tensor([[5, 6, 7]])
eager = model(ids, decoder_input_ids=ids, output_attentions=True).logits
assert (model(ids, decoder_input_ids=ids).logits - eager).abs().max() < 1e-4
files = {name.rpartition(".")[2] for name in sys.modules if ".ops_attention" in name}
assert "ops_attention" in files and not files & {"ops_attention_forward", "ops_attention_backward"}, files
print("loaded")
"""


@pytest.mark.parametrize("place", [pytest.param("folder", marks=pytest.mark.slow), "hub"])
def test_a_repository_loads_where_triton_is_not_installed(tmp_path, place):
    """From the Hub the loader checks the imports of every file, from a folder only those of the first."""
    folder, name = tmp_path / "model", str(tmp_path / "model")
    if place == "hub":
        revision = "0123456789abcdef0123456789abcdef01234567"
        repository, name = tmp_path / "hf" / "hub" / "models--someone--tiny", "someone/tiny"
        folder = repository / "snapshots" / revision
    build_flash("t5", build_stock("t5"), None).save_pretrained(folder)
    if place == "hub":
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(revision)
    result = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_TRITON, name],
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stdout.strip() == "loaded", result.stderr[-4000:]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["none", "right", "left", "segments"])
@pytest.mark.parametrize("family", ["t5", "umt5"])
def test_bf16_is_as_near_to_fp32_as_eager_is(family, kind):
    eager, fused = pair(family)
    inputs = inputs_of(kind)
    exact, exact_grads = gradients(eager, inputs)
    real = inputs["labels"] != -100
    errors = []
    for model in (eager, fused):
        exact_grads = {name: gradient.float().clone() for name, gradient in exact_grads.items()}
        output, grads = gradients(model.bfloat16(), inputs)
        error = [(output.logits[real].float() - exact.logits[real]).norm() / exact.logits[real].norm()]
        error += [(grads[name].float() - gradient).norm() / gradient.norm() for name, gradient in exact_grads.items()]
        errors.append(torch.stack(error))
    assert (errors[1] < 1.5 * errors[0] + 1e-2).all()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["none", "right", "left", "segments"])
def test_memory_is_linear_in_length(kind):
    """Quadrupled length, quadrupled memory; a [L, L] bias in fp32 alone would take 16 times as much, and 8 GiB."""
    peaks = []
    for length in (4096, 16384):
        _, fused = pair(num_layers=2)
        fused.bfloat16()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules[__name__], "LENGTHS", (length, length, 2))
            inputs = inputs_of(kind)
        gradients(fused, inputs)  # what is allocated once
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(fused, inputs)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del fused, inputs
    assert peaks[1] < 4.4 * peaks[0]
