"""A model learns the same from packed and from unpacked examples: equal loss, equal gradients."""

import numpy as np
import pytest
import torch
from denoising import T5_IDS, text

import fat5.model.attention_mask
from fat5.data import Mixture, MixtureOptions, layout
from fat5.data.packing import best_fit
from fat5.data.random_streams import example_keys
from fat5.model import FlashT5Config, FlashT5ForConditionalGeneration


def small_model(implementation):
    config = FlashT5Config(
        vocab_size=32128,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = FlashT5ForConditionalGeneration(config)
    model.set_attn_implementation(implementation)
    return model.train()


def loss_and_gradients(model, batch):
    """Mean loss over the targets of a batch, and the gradient of every parameter."""
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    return out.loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "fat5"])
@pytest.mark.parametrize("name", ["ul2_fat5", "prefix_lm"])
def test_loss_and_gradients_of_a_packed_batch_are_those_of_its_examples(implementation, name, monkeypatch):
    # With the operator's reference behind it, fat5 runs here too, whole stacks packed.
    monkeypatch.setattr(fat5.model.attention_mask, "kernels_serve", lambda _: True)
    rng = np.random.default_rng(0)
    mixture = Mixture(MixtureOptions(name).resolved(), T5_IDS)
    windows = [text(rng, n) for n in rng.integers(2, 90, 24)]
    lengths = np.array([len(w) for w in windows])
    plan = mixture.plan(example_keys(0, 0, np.arange(24)), lengths)
    bins = best_fit(plan.input_lengths, plan.label_lengths, 128, 128)
    order = np.argsort(bins, kind="stable")
    plan = plan.take(order)
    inputs, labels = mixture.corrupt([windows[i] for i in order], plan)
    flat = inputs, plan.input_lengths, labels, plan.label_lengths
    rows = np.bincount(bins)
    assert len(rows) < 24
    model = small_model(implementation)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)  # biases and norms too, so that positions matter
    apart = loss_and_gradients(model, layout.padded(*flat, pad=0))
    largest = max(g.abs().max() for g in apart[1].values())
    for batch in (layout.segments(*flat, rows, 128, 128, pad=0), layout.stream(*flat)):
        packed = loss_and_gradients(model, batch)
        assert packed[0] == pytest.approx(apart[0], rel=1e-5)
        for key, gradient in apart[1].items():
            scale = gradient.abs().max()
            assert scale > 0, key
            assert (packed[1][key] - gradient).abs().max() <= 1e-5 * max(scale, 0.01 * largest), key
    # The test can fail: without segments, neighbours see each other.
    blind = layout.segments(*flat, rows, 128, 128, pad=0)
    for side in ("encoder", "decoder"):
        blind[f"{side}_segment_ids"] = blind[f"{side}_segment_ids"].clamp(max=1)
    assert abs(loss_and_gradients(model, blind)[0] - apart[0]) > 1e-4 * apart[0]
