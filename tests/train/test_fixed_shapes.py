"""Batches laid out for CUDA graphs: other tensors, the same loss and gradients."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy_training import VOCABULARY, toy_model

import fat5.model.attention_mask
from fat5.data import layout
from fat5.model import FlashT5Config, FlashT5ForConditionalGeneration
from fat5.train.fixed_shapes import FixedShapes
from fat5.train.run import _shapes_of_graphs

LONGEST = 40, 24  # of an example
WIDTHS = 60, 50  # of a row of segments


def examples(seed: int, n: int):
    """Random inputs and targets, flat, and the lengths of each."""
    random = np.random.default_rng(seed)
    lengths = [random.integers(1, most + 1, n) for most in LONGEST]
    inputs, labels = (random.integers(3, VOCABULARY, lengths.sum()) for lengths in lengths)
    return inputs, lengths[0], labels, lengths[1]


def lay_out(form: str, made, rows: int):
    if form == "none":
        return layout.padded(*made, pad=0)
    if form == "stream":
        return layout.stream(*made)
    sizes = np.bincount(np.arange(len(made[1])) % rows, minlength=rows)  # as many examples in each row, about
    return layout.segments(*made, sizes, WIDTHS[0] * sizes.max(), WIDTHS[1] * sizes.max(), pad=0)


def shapes(n: int, inputs: int = 64, labels: int = 64) -> FixedShapes:
    return FixedShapes(inputs * 16 * n, labels * 16 * n, *LONGEST, pad=0)


@pytest.mark.parametrize("form", ["none", "segments", "stream"])
@pytest.mark.parametrize("n", [1, 7, 16])
def test_loss_and_gradients_are_those_of_the_batch(form, n):
    model = toy_model(attn_implementation="eager").double().train()
    batch = lay_out(form, examples(n, n), rows=3 if n > 3 else 1)
    found = []
    for inputs in (batch, shapes(1).stream(batch)):
        model.zero_grad()
        loss = model(**inputs, num_items_in_batch=100).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for got, expected in zip(*reversed(found), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["none", "segments", "stream"])
def test_batches_of_a_kind_have_few_shapes(form):
    found = set()
    for seed in range(40):
        inputs, input_lengths, labels, label_lengths = examples(seed, 32)
        made = shapes(2).stream(lay_out(form, (inputs, input_lengths, labels, label_lengths), rows=4))
        assert made["input_ids"][0, : len(inputs)].tolist() == inputs.tolist()
        assert made["labels"][0, : len(labels)].tolist() == labels.tolist()
        assert not made["input_ids"][0, len(inputs) :].any()
        assert (made["labels"][0, len(labels) :] == -100).all()
        for side, lengths, name in (("encoder", input_lengths, "input_ids"), ("decoder", label_lengths, "labels")):
            ends = made[f"{side}_cu_seqlens"]
            assert ends.dtype == torch.int32
            assert ends.diff()[:32].tolist() == lengths.tolist()
            assert int(ends[-1]) == made[name].shape[1]
            assert 0 <= int(ends.diff().min()) <= int(ends.diff().max()) <= made[f"{side}_max_length"]
        found.add(tuple((k, v.shape if torch.is_tensor(v) else v) for k, v in made.items()))
    assert len(found) <= 8


def test_a_batch_that_fills_its_shape_is_left_as_it_is():
    lengths = np.array([40, 24])
    made = (np.full(64, 5), lengths, np.full(64, 6), lengths[::-1].copy())
    batch = lay_out("stream", made, 1) | {"denoiser": torch.zeros(2), "state": {"place": 3}}
    filled = FixedShapes(64 * 16, 64 * 16, 40, 40, pad=0).stream(batch)
    for name, value in batch.items():
        if name not in ("encoder_max_length", "decoder_max_length"):
            assert torch.equal(filled[name], value) if torch.is_tensor(value) else filled[name] == value


@pytest.mark.parametrize(("kind", "streams"), [("t5", True), ("RoPE", True), ("FIRE", False)])
def test_a_bias_that_is_a_matrix_is_not_made_for_a_stream(kind, streams, monkeypatch):
    monkeypatch.setattr(fat5.model.attention_mask, "kernels_serve", lambda _: True)
    config = FlashT5Config(
        vocab_size=99, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, position_encoding_type=kind,
        attn_implementation="fat5",
    )  # fmt: skip
    recipe = SimpleNamespace(
        data=SimpleNamespace(max_input_length=16, max_target_length=8),
        training=SimpleNamespace(cuda_graphs=True, gradient_checkpointing=False, micro_batch_size=2),
    )
    model, arguments = FlashT5ForConditionalGeneration(config), SimpleNamespace(device=torch.device("cuda"))
    assert (_shapes_of_graphs(recipe, model, arguments, 0) is not None) == streams
