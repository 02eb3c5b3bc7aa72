"""Trained tokenizers have T5's layout; extended ones keep every id and give new rows the mean of their old pieces."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from fat5.data import MixtureOptions, special_ids
from fat5.data.extend_tokenizer import extend_model, extend_tokenizer
from fat5.data.save_tokenizer import save_tokenizer
from fat5.data.train_tokenizer import train_tokenizer
from fat5.model import FlashT5Config, FlashT5ForConditionalGeneration

SNOWMAN = "a snowman ☃ costs 5 € 漢字"


def test_what_is_saved_is_for_every_release_of_transformers(tmp_path, prose):
    """Transformers 4 knows no `TokenizersBackend`, and would make `token_type_ids`, which no T5 takes."""
    made = train_tokenizer(prose[:5], "bpe", 1000)
    extended, _ = extend_tokenizer(train_tokenizer(prose[:5], "unigram", 1000), prose[5:8], 20)
    for name, tokenizer in {"made": made, "extended": extended}.items():
        save_tokenizer(tokenizer, tmp_path / name)
        saved = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
        loaded = AutoTokenizer.from_pretrained(tmp_path / name)
        assert loaded.model_input_names == ["input_ids", "attention_mask"]
        assert loaded(SNOWMAN) == tokenizer(SNOWMAN)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize(("sentinels", "modes", "fallback"), [(100, True, True), (300, False, True), (7, True, False)])
def test_layout_and_round_trip(tmp_path, prose, kind, sentinels, modes, fallback):
    size = 1500
    made = train_tokenizer(prose[:15], kind, size, sentinels=sentinels, mode_tokens=modes, byte_fallback=fallback)
    made.save_pretrained(tmp_path / "t")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert len(loaded) == len(made) <= size
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2)
    ids = special_ids(loaded, MixtureOptions().resolved())
    assert ids.sentinels.tolist() == [len(loaded) - 1 - n for n in range(sentinels)]
    first = len(loaded) - sentinels - 3
    found = {mode: loaded.convert_tokens_to_ids(mode) for mode in ("[R]", "[S]", "[X]")}
    assert (found == {"[R]": first, "[S]": first + 1, "[X]": first + 2}) == modes
    assert sorted(loaded.get_vocab().values()) == list(range(len(loaded)))
    encoded = loaded(SNOWMAN)["input_ids"]
    assert encoded[-1] == 1
    assert (loaded.unk_token_id in encoded) != fallback
    if fallback:
        assert loaded.decode(encoded, skip_special_tokens=True) == SNOWMAN
    # Spaces at the ends and doubled ones go, as in T5.
    assert loaded("  a   dog ")["input_ids"] == loaded("a dog")["input_ids"]
    assert loaded("x <extra_id_3> y")["input_ids"].count(int(ids.sentinels[3])) == 1


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_text_that_spells_special_tokens_teaches_none(prose, kind):
    names = ["<pad>", "</s>", "<unk>", "[S]", "<extra_id_0>", "<extra_id_7>", "<0x41>", "＜/s＞"]
    made = train_tokenizer(
        [" ".join(names * 3) + " " + "".join(names) + p for p in prose[:30]], kind, 1200, sentinels=7
    )
    assert (made.pad_token_id, made.eos_token_id, made.unk_token_id) == (0, 1, 2)
    assert made("a")["input_ids"][-1] == 1
    vocabulary = made.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(made)))
    assert special_ids(made, MixtureOptions().resolved()).sentinels.tolist() == [len(made) - 1 - n for n in range(7)]
    # Each name once, as its own token or not at all: no piece holds one.
    for name, times in zip(names, [1, 1, 1, 1, 1, 0, 1, 0], strict=True):
        assert [name in token for token in vocabulary].count(True) == times, name


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_endless_words_and_broken_surrogates_teach_what_they_can(prose, kind):
    endless = "".join(map(str, np.random.default_rng(0).integers(0, 1000, 10_000)))
    made = train_tokenizer([*prose[:10], endless, "a \ud800 b", ""], kind, 900)
    assert made.decode(made("in 42 words")["input_ids"], skip_special_tokens=True) == "in 42 words"


def test_a_vocabulary_too_small_is_refused(prose):
    with pytest.raises(ValueError, match="make it larger"):
        train_tokenizer(prose, "unigram", 400)
    characters = ["".join(chr(0x4E00 + n) for n in range(3000))]
    with pytest.raises(ValueError, match="cannot be trained: The vocabulary is not large enough"):
        train_tokenizer(characters, "unigram", 1000)


FRENCH = ["La maison était grande et le château était vieux, cependant la vieille maison était belle."] * 40 + [
    "Il était une fois un château près de la maison de la grand-mère, où vivait une vieille reine.",
    "Le roi demanda pourquoi la reine était si triste, et elle répondit qu'elle voulait revoir la maison.",
] * 20


def test_extension_keeps_every_id_and_shortens_the_text(tmp_path, tokenizer):
    extended, parts = extend_tokenizer(tokenizer, FRENCH, 25)
    extended.save_pretrained(tmp_path / "t")
    extended = AutoTokenizer.from_pretrained(tmp_path / "t")
    old, new = tokenizer.get_vocab(), extended.get_vocab()
    assert all(new[token] == i for token, i in old.items())
    assert len(parts) == 25
    assert sorted(new.values()) == list(range(len(old) + 25))
    assert sorted(parts) == list(range(len(old), len(old) + 25))
    before, after = (sum(len(t(s)["input_ids"]) for s in FRENCH) for t in (tokenizer, extended))
    assert after < 0.8 * before
    pieces = {i: token for token, i in new.items()}
    for i, old_ids in parts.items():
        assert len(old_ids) > 1
        assert "".join(pieces[n] for n in old_ids) == pieces[i] or any(pieces[n].startswith("<0x") for n in old_ids)
    for text in (FRENCH[-1], "see <extra_id_3> there"):
        assert extended.decode(extended(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    # Sentinels and modes stay where they were; nothing else of the text's ids is special.
    assert np.array_equal(
        special_ids(tokenizer, MixtureOptions().resolved()).sentinels,
        special_ids(extended, MixtureOptions().resolved()).sentinels,
    )


def test_extension_leaves_the_free_rows_to_the_mode_tokens(prose):
    plain = train_tokenizer(prose[:20], "unigram", 1000, mode_tokens=False)
    before = special_ids(plain, MixtureOptions().resolved(), len(plain) + 28)
    extended, parts = extend_tokenizer(plain, FRENCH, 10)
    assert special_ids(extended, MixtureOptions().resolved(), len(plain) + 28).modes == before.modes
    assert min(parts) == len(plain) + 3


def test_extension_adds_no_piece_that_spells_a_special_token(prose):
    plain = train_tokenizer(prose[:20], "unigram", 1000, sentinels=7, mode_tokens=False)
    extended, parts = extend_tokenizer(plain, ["la maison<extra_id_7>[S]" * 3 + p for p in FRENCH[:40]], 400)
    ids = special_ids(extended, MixtureOptions().resolved())
    assert len(ids.sentinels) == 7
    assert ids.modes == {"[R]": len(plain), "[S]": len(plain) + 1, "[X]": len(plain) + 2}
    assert not any("[S]" in t or "<extra_id_7>" in t for t in extended.convert_ids_to_tokens(sorted(parts)))


def test_only_unigram_can_be_extended(bare_tokenizer):
    with pytest.raises(ValueError, match="no Unigram model"):
        extend_tokenizer(bare_tokenizer, FRENCH, 10)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_of_the_old_pieces(tied):
    config = FlashT5Config(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        tie_word_embeddings=tied,
    )
    model = FlashT5ForConditionalGeneration(config)
    tables = {"in": model.get_input_embeddings(), "out": model.get_output_embeddings()}
    before = {name: table.weight.detach().clone() for name, table in tables.items()}
    assert torch.equal(before["in"], before["out"]) == tied
    extend_model(model, 46, {38: [3, 4], 41: [5, 6, 7], 44: [8]})
    for name, old in before.items():
        weight = (model.get_input_embeddings() if name == "in" else model.get_output_embeddings()).weight
        assert weight.shape == (46, 16)
        assert torch.equal(weight[:38], old[:38])
        assert torch.allclose(weight[38], old[[3, 4]].mean(0), atol=1e-6)
        assert torch.allclose(weight[41], old[[5, 6, 7]].mean(0), atol=1e-6)
        assert torch.equal(weight[44], old[8])
        assert torch.allclose(weight[45], old.mean(0), atol=1e-6)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert model.config.vocab_size == 46
