"""The count of operations, by hand and against torch's own counter, and the counts of batches."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from toy_training import toy_model

from fat5.data import layout
from fat5.model import FlashT5Config
from fat5.train.flops import Counts, count, training_flops


def test_a_small_case_by_hand():
    """One layer each, d 4, two heads of 3 (inner 6), d_ff 5 gated, vocabulary 7; one example of 2 and 3 tokens."""
    config = FlashT5Config(
        vocab_size=7, d_model=4, d_kv=3, d_ff=5, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    counts = Counts(encoder=2, decoder=3, places=5, encoder_pairs=4, decoder_pairs=9, cross_pairs=6)
    projection, feed_forward = 2 * 4 * 6, 2 * 3 * 4 * 5  # a token's operations: two for each weight
    encoder = 2 * (4 * projection + feed_forward) + 2 * (2 * 4 * 6)  # q k v o; scores and their use, 2 x 2 pairs
    decoder = 3 * (4 * projection + 2 * projection + feed_forward) + 2 * projection * 2  # and k, v of the 2 tokens
    attention = 2 * (2 * 9 * 6) + 2 * (2 * 6 * 6)
    head = 3 * 2 * 4 * 7
    assert training_flops(config, counts) == 3 * (encoder + decoder + attention + head)


@pytest.mark.parametrize("feed_forward", ["gated-gelu", "relu"])
def test_it_is_what_torch_counts_of_a_step(feed_forward):
    """Matrix products of forward and backward on the eager path; one length a side, so nothing is padding."""
    model = toy_model(feed_forward_proj=feed_forward, attn_implementation="eager", num_layers=3, num_decoder_layers=2)
    batch = {
        "input_ids": torch.randint(3, 48, (2, 7)),
        "attention_mask": torch.ones(2, 7, dtype=torch.long),
        "labels": torch.randint(3, 48, (2, 5)),
    }
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    assert training_flops(model.config, count(batch)) == counter.get_total_flops()


def test_all_layouts_of_the_same_examples_count_alike_but_for_padding():
    random = np.random.default_rng(0)
    ins, outs = np.array([5, 3, 7, 2]), np.array([2, 6, 1, 4])
    flat = random.integers(3, 40, ins.sum()), ins, random.integers(3, 40, outs.sum()), outs
    rows = layout.padded(*flat, 0)
    packed = layout.segments(*flat, np.array([3, 1]), 16, 10, 0)
    stream = layout.stream(*flat)
    expected = {
        "encoder": 17,
        "decoder": 13,
        "encoder_pairs": int((ins**2).sum()),
        "decoder_pairs": int((outs**2).sum()),
        "cross_pairs": int((ins * outs).sum()),
    }
    for batch, places in ((rows, 4 * 7 + 4 * 6), (packed, 2 * 16 + 2 * 10), (stream, 30)):
        assert count(batch) == Counts(**expected, places=places)
