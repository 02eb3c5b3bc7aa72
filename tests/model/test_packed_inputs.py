"""Segments as they are given, and labels of the sequences in them."""

import pytest
import torch

from fat5.model.packed_inputs import Segments, read_segments, require_a_pair, shift_right, until_last_label


def test_segments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"`decoder_segment_ids` must be \[2, 3\], got \[2, 4\]"):
        read_segments("decoder", torch.Size([2, 3]), None, torch.ones(2, 4), None, None)
    rows = Segments((1, 3), row_ids=torch.ones(1, 3))
    with pytest.raises(ValueError, match="give both sides in the same form"):
        require_a_pair(rows, Segments((1, 3), cu_seqlens=torch.tensor([0, 3]), longest=3))


def test_labels_are_shifted_within_the_examples_of_a_stream():
    segments = read_segments("decoder", torch.Size([1, 6]), None, None, torch.tensor([0, 3, 3, 5, 6]), 3)
    assert segments.ids.tolist() == [[1, 1, 1, 3, 3, 4]]
    assert shift_right(torch.tensor([[11, 12, 13, 21, -100, 31]]), segments.ids, 7, 0).tolist() == [
        [7, 11, 12, 7, 21, 7]
    ]


def test_what_is_behind_the_last_label_is_padding():
    labels = torch.tensor([[-100, 5, -100, 6, -100], [-100] * 5, [1] * 5])
    assert until_last_label(labels).int().tolist() == [[1, 1, 1, 1, 0], [0] * 5, [1] * 5]
