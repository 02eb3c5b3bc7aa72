"""How masks become what the kernels take, and which masks they cannot take. No kernel runs here."""

from itertools import pairwise

import pytest
import torch

import fat5.model.attention_mask
from fat5.model.attention_layout import packed_layout, padded_layout
from fat5.model.attention_mask import AttentionMask

CPU = torch.device("cpu")
RIGHT = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
LEFT = RIGHT.flip(1)
HOLES = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 1]]).bool()


def mask(query_length=4, key_length=4, **fields):
    return AttentionMask(query_length, key_length, CPU, **fields)


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(fat5.model.attention_mask, "kernels_serve", lambda _: True)


def prepared(mask):
    return mask.prepare("fat5", torch.float32, 64)


def test_padding_at_the_end_is_lengths():
    assert padded_layout(RIGHT).key_lengths.tolist() == [3, 4, 0]
    assert padded_layout(RIGHT[1:2]).key_lengths is None
    assert padded_layout(LEFT) is None
    assert padded_layout(HOLES) is None


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("gaps", [False, True])
def test_packed_tokens_are_the_segments_one_after_another(rows, gaps):
    generator = torch.Generator().manual_seed(rows)
    segments = torch.zeros(rows, 40, dtype=torch.long)
    expected = []
    for row in range(rows):
        at = 3 * row
        for segment in range(1, 5):
            length = int(torch.randint(1, 8, (1,), generator=generator)) if (row, segment) != (2, 3) else 0
            segments[row, at : at + length] = segment
            expected.append([row * 40 + at + i for i in range(length)])
            at += length + gaps
    layout = packed_layout(segments, segments)
    assert layout.queries is layout.keys
    assert layout.keys.neighbours
    starts = layout.keys.cu_seqlens.tolist()
    assert [layout.keys.order[a:b].tolist() for a, b in pairwise(starts)] == expected
    assert layout.keys.cu_seqlens.dtype == torch.int32
    assert layout.keys.longest == max(map(len, expected))
    states = torch.randn(rows, 3, 40, 5)
    again = layout.keys.scatter(layout.keys.gather(states))
    assert torch.equal(again, states * (segments > 0)[:, None, :, None])
    states = torch.randn(rows, 40, 5)
    packed = layout.keys.pack(states)
    assert torch.equal(packed[0], states.flatten(0, 1)[layout.keys.order])
    assert torch.equal(layout.keys.unpack(packed), states * (segments > 0)[..., None])


def test_segments_of_queries_and_keys_correspond():
    queries, keys = torch.tensor([[1, 2, 2], [3, 3, 0]]), torch.tensor([[2, 1, 1, 0, 2], [0, 0, 3, 3, 1]])
    layout = packed_layout(queries, keys)
    assert layout.queries.cu_seqlens.tolist() == [0, 1, 3, 3, 3, 3, 5]
    assert layout.keys.cu_seqlens.tolist() == [0, 2, 4, 4, 5, 5, 7]
    assert layout.queries.order.tolist() == [0, 1, 2, 3, 4]
    assert layout.keys.order.tolist() == [1, 2, 0, 4, 9, 7, 8]
    assert (layout.queries.longest, layout.keys.longest) == (2, 2)
    assert (layout.queries.neighbours, layout.keys.neighbours) == (True, False)


@pytest.mark.parametrize("segments", [[[0, 0, 0, 0]], [[1, -1, 2, 2]], [[1, 9, 9, 9]]])
def test_segments_that_cannot_be_packed(segments):
    segments = torch.tensor(segments)
    assert packed_layout(segments, segments) is None


@pytest.mark.parametrize("segments", [[[1, 2, 1, 2]], [[1, 1, 0, 1]]])
def test_segments_that_are_no_neighbours_in_their_row(segments):
    segments = torch.tensor(segments)
    assert not packed_layout(segments, segments).keys.neighbours


def kind(layout):
    if layout is None:
        return "dense"
    if layout.queries is not None:
        return "packed"
    return "whole" if layout.key_lengths is None else "lengths"


SEGMENTS = torch.tensor([[1, 1, 2, 0], [1, 2, 2, 2], [1, 1, 1, 1]])
MASKS = {
    "nothing": ({}, "whole"),
    "causal": ({"causal": True}, "whole"),
    "cached": ({"causal": True, "query_length": 2, "query_offset": 2}, "whole"),
    "static cache": ({"causal": True, "query_length": 1, "query_offset": torch.tensor(2)}, "dense"),
    "all real": ({"key_mask": torch.ones(3, 4).bool()}, "whole"),
    "right": ({"key_mask": RIGHT}, "lengths"),
    "right, cached": ({"key_mask": RIGHT, "causal": True, "query_length": 2, "query_offset": 2}, "lengths"),
    "left": ({"key_mask": LEFT}, "packed"),
    "left, cached": ({"key_mask": LEFT, "causal": True, "query_length": 2, "query_offset": 2}, "dense"),
    "holes": ({"key_mask": HOLES}, "dense"),
    "segments": ({"query_segments": SEGMENTS, "key_segments": SEGMENTS}, "packed"),
    "segments with holes": ({"query_segments": SEGMENTS, "key_segments": SEGMENTS, "key_mask": HOLES}, "dense"),
    "cross, left": ({"cross": True, "key_mask": LEFT, "query_length": 3}, "packed"),
    "cross, holes": ({"cross": True, "key_mask": HOLES, "query_length": 3}, "packed"),
    "cross, left, one query": ({"cross": True, "key_mask": LEFT, "query_length": 1}, "dense"),
    "cross, right, one query": ({"cross": True, "key_mask": RIGHT, "query_length": 1}, "dense"),
    "cross, segments": (
        {"cross": True, "query_segments": SEGMENTS[:, 1:], "key_segments": SEGMENTS, "query_length": 3},
        "packed",
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_layout_of_each_mask(name, kernels):
    fields, expected = MASKS[name]
    ready = prepared(mask(**fields))
    assert kind(ready.layout) == expected
    if expected != "dense":
        assert ready.allowed is None
        assert ready.visible is None


@pytest.mark.parametrize("name", MASKS)
def test_without_a_look_at_the_mask_only_what_needs_none_is_fused(name, kernels, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    fields, _ = MASKS[name]
    expected = "whole" if name in ("nothing", "causal", "cached") else "dense"
    assert kind(prepared(mask(**fields)).layout) == expected


def test_who_is_not_served(kernels, monkeypatch):
    assert mask().prepare("fat5", torch.float32, 64).layout is not None
    assert mask().prepare("fat5", torch.float64, 64).layout is None
    assert mask().prepare("fat5", torch.float32, 512).layout is None
    assert mask().prepare("sdpa", torch.float32, 64).layout is None
    monkeypatch.setattr(fat5.model.attention_mask, "kernels_serve", lambda _: False)
    assert mask().prepare("fat5", torch.float32, 64).layout is None


def test_a_mask_that_hides_nothing_is_left_out_unless_a_trace_would_keep_that():
    nothing, rows = torch.ones_like(RIGHT), RIGHT[:2]
    assert mask(3, 4, cross=True, key_mask=nothing).build_dense().allowed is None
    built = mask(3, 4, cross=True, key_mask=rows).build_dense()
    assert torch.equal(built.allowed[:, 0, 0], rows)
    assert built.visible is None
    assert mask(3, 4, cross=True, key_mask=RIGHT).build_dense().visible.flatten().tolist() == [True, True, False]

    def attend(key_mask):
        return mask(3, 4, cross=True, key_mask=key_mask).build_dense().additive(None, torch.float32)

    assert torch.equal(torch.jit.trace(attend, nothing)(RIGHT), attend(RIGHT))
