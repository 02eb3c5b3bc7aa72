"""Sentinels by family and by name, and mode tokens in the rows where the design wants them."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from fat5.data.denoisers import MIXTURES, Denoiser
from fat5.data.span_corruption import Mixture
from fat5.data.special_ids import find_sentinels, special_ids


def words(named, size=0, **special):
    """A tokenizer of `size` ids, some of which have the names given."""
    vocabulary = {named.get(i, f"w{i}"): i for i in range(max(size, 3, 1 + max(named, default=0)))}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "w2")),
        eos_token="w1",
        unk_token="w2",
        **{"pad_token": "w0", **special},
    )


@pytest.mark.parametrize(
    ("size", "first", "count", "name"),
    [
        (32100, 32099, 100, "<extra_id_0>"),
        (250100, 250099, 100, "▁<extra_id_0>"),
        (256300, 256299, 300, "<extra_id_0>"),
    ],
)
def test_families_are_recognised(size, first, count, name):
    # Only the first sentinel has its name: the others' ids come from the family.
    ids, in_text = find_sentinels(words({first: name}, size))
    assert ids.tolist() == list(range(first, first - count, -1))
    assert not in_text


def test_byt5_has_the_ids_it_was_trained_with():
    tokenizer = ByT5Tokenizer()
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == 259
    ids, in_text = find_sentinels(tokenizer)
    assert ids.tolist() == list(range(258, 158, -1))
    assert in_text
    special = special_ids(tokenizer, MIXTURES["ul2_fat5"])
    # Bytes above 0x9b are sentinels too, and must stay allowed as text.
    assert not special.reserved & set(range(3, 259))
    assert special.modes == {"[R]": 384, "[S]": 385, "[X]": 386}
    assert special.rows == 387


def test_sentinels_by_name_need_not_be_contiguous():
    named = {70: "<extra_id_0>", 12: "<extra_id_1>", 55: "▁<extra_id_2>", 13: "<extra_id_4>", 14: "<extra_id_x>"}
    ids, _ = find_sentinels(words(named, 100))
    assert ids.tolist() == [70, 12, 55]  # 3 is missing, so 4 is not used


def test_a_tokenizer_without_sentinels_is_refused_where_they_are_needed():
    tokenizer = words({}, 100)
    with pytest.raises(ValueError, match="no sentinels"):
        special_ids(tokenizer, MIXTURES["t5_span_corruption"])
    with pytest.raises(ValueError, match="no sentinels"):
        special_ids(tokenizer, [Denoiser("prefix", sentinel=True)])
    assert len(special_ids(tokenizer, MIXTURES["prefix_lm"]).sentinels) == 0
    with pytest.raises(ValueError, match="at least 2 sentinels"):
        Mixture(
            MIXTURES["t5_span_corruption"], special_ids(words({5: "<extra_id_0>"}, 100), MIXTURES["t5_span_corruption"])
        )


def test_a_family_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="too few for the sentinels of mt5"):
        find_sentinels(words({}, 32100), "mt5")
    with pytest.raises(ValueError, match="unknown sentinel family"):
        find_sentinels(words({}, 100), "t6")


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = words({}, 100)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS"):
        special_ids(tokenizer, MIXTURES["prefix_lm"])


def test_mode_tokens_take_free_rows_of_the_padded_embedding():
    tokenizer = words({32099: "<extra_id_0>"}, 32100)
    ids = special_ids(tokenizer, MIXTURES["ul2_fat5"], 32128)
    assert ids.modes == {"[R]": 32100, "[S]": 32101, "[X]": 32102}
    assert ids.rows == 32128
    assert set(ids.modes.values()) < ids.reserved
    # The same rows when only one of them is used, so that a run can go on with another mixture.
    assert special_ids(tokenizer, [Denoiser(mode="[X]")], 32128).modes == {"[X]": 32102}


def test_mode_tokens_take_new_rows_where_none_is_free():
    named = {20: "<extra_id_0>", 21: "<extra_id_1>"}
    ids = special_ids(words(named, 100), MIXTURES["ul2_fat5"], 101)
    assert ids.modes == {"[R]": 100, "[S]": 101, "[X]": 102}
    assert ids.rows == 103
    own = special_ids(words(named, 100), [Denoiser(mode="[Z]"), Denoiser(mode="[A]"), Denoiser(mode="[R]")], 100)
    assert own.modes == {"[R]": 100, "[A]": 103, "[Z]": 104}
    assert own.rows == 105


def test_a_mode_token_of_the_tokenizer_keeps_its_id():
    ids = special_ids(words({20: "<extra_id_0>", 21: "<extra_id_1>", 50: "[S]"}, 100), MIXTURES["ul2_fat5"], 128)
    assert ids.modes == {"[R]": 100, "[S]": 50, "[X]": 101}
    # Reserved even when no denoiser uses it: a corpus then serves every mixture.
    assert 50 in special_ids(words({20: "<extra_id_0>", 50: "[S]"}, 100), MIXTURES["prefix_lm"]).reserved


@pytest.mark.parametrize("mode", ["<extra_id_1>", "w0", "w1", "w2"])
def test_a_mode_token_that_means_something_else_is_refused(mode):
    with pytest.raises(ValueError, match=f"the mode {mode} is a sentinel, EOS, padding or unknown token"):
        special_ids(words({20: "<extra_id_0>", 21: "<extra_id_1>"}, 100), [Denoiser(mode=mode)], 128)


def test_without_mode_tokens_no_rows_are_needed():
    ids = special_ids(words({20: "<extra_id_0>"}, 100), MIXTURES["t5_span_corruption"], 100)
    assert ids.modes == {}
    assert ids.rows == 100


def test_the_tokenizers_own_special_ids_are_reserved_but_for_unk(tokenizer):
    ids = special_ids(tokenizer, MIXTURES["ul2_fat5"])
    assert {tokenizer.pad_token_id, tokenizer.eos_token_id} < ids.reserved
    assert tokenizer.unk_token_id not in ids.reserved
    assert set(ids.sentinels.tolist()) < ids.reserved
    assert ids.sentinels.tolist() == list(np.arange(1999, 1899, -1))
    assert ids.modes == {m: tokenizer.convert_tokens_to_ids(m) for m in ("[R]", "[S]", "[X]")}
