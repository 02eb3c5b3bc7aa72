"""Text in, ids of text out: whatever the text spells, however long it is, its letters come back."""

import json
import pickle
import unicodedata

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from fat5.data import CorpusOptions, DataError, MixtureOptions, encode, special_ids, tokenize_corpus
from fat5.data.encode import Encoder, SpecialTokenError, split_text
from fat5.data.plain_text import BLANKS, PlainText
from fat5.data.stream import WindowStream


@pytest.fixture
def ids(tokenizer):
    return special_ids(tokenizer, MixtureOptions().resolved())


def plain(tokenizer, text):
    """The ids of a text that spells nothing special."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def test_text_that_spells_special_tokens_is_text(tokenizer, ids):
    texts = ["see <extra_id_7> and [R] and </s><pad> here", "<extra_id_0>", "plain words", "[S][S] a[X]b"]
    encoded = Encoder(tokenizer, ids)(texts)
    for text, tokens in zip(texts, encoded, strict=True):
        assert not ids.reserved & set(tokens.tolist())
        assert tokenizer.decode(tokens.tolist()) == text
    assert set(plain(tokenizer, "[S]")) & ids.reserved  # it could go wrong


@pytest.mark.parametrize("kind", ["tokenizer", "bare_tokenizer"])
@pytest.mark.parametrize(
    "text",
    [
        "a ＜/s＞ b﹤/s﹥",
        "＜pad＞＜pad＞",
        "e\u0301 ＜extra_id_0＞ and <\x01extra_id_1>",
        "[［S] ［S］ [S]",
        "a <0x41> and <0x42>",
        "＜0x41＞ <0ｘ42> <0\x0143>",
        "<unk> ＜unk＞ ☃<unk>☃",
        "<extra_id_<extra_id_0>0>",
    ],
)
def test_text_that_spells_special_tokens_when_normalised_and_bytes_are_text(request, kind, text):
    tokenizer = request.getfixturevalue(kind)
    ids = special_ids(tokenizer, ())
    (tokens,) = Encoder(tokenizer, ids)([text])
    assert not (ids.reserved | {tokenizer.unk_token_id}) & set(tokens.tolist())
    assert tokenizer.decode(tokens.tolist()) == unicodedata.normalize("NFKC", text.replace("\x01", ""))


@pytest.mark.parametrize("kind", ["tokenizer", "bare_tokenizer"])
def test_other_text_has_the_tokenizers_own_ids(request, kind, prose):
    tokenizer = request.getfixturevalue(kind)
    texts = [*prose[:40], "", " ", "a  b\n\tc ", "☃ 漢字☃☃ é 😀", "\u00a0x\u200by"]
    found = Encoder(tokenizer, special_ids(tokenizer, ()))(texts)
    assert [f.tolist() for f in found] == [plain(tokenizer, text) for text in texts]


def test_names_of_byt5_are_bytes(monkeypatch):
    tokenizer = ByT5Tokenizer()
    text = "a</s> <pad>é<extra_id_0>[S]"
    (tokens,) = Encoder(tokenizer, special_ids(tokenizer, ()))([text])
    assert tokens.tolist() == [b + 3 for b in text.encode()]
    monkeypatch.setattr(encode, "_PIECE", 100)
    (tokens,) = Encoder(tokenizer, special_ids(tokenizer, ()))([text * 40])
    assert bytes((tokens - 3).astype(np.uint8)).decode() == text * 40


def small(model, pre_tokenizer=None, normalizer=None):
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.Metaspace()
    if normalizer is not None:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def pieces_of(text):
    return ["<unk>", "</s>", "[S]", *sorted({*text, "▁"})]


def test_merges_make_no_special_token():
    vocabulary = {token: n for n, token in enumerate([*pieces_of("ab[S]"), "[S", "ab"])}
    tokenizer = small(models.BPE(vocabulary, [("[", "S"), ("[S", "]"), ("a", "b")], unk_token="<unk>"))
    (tokens,) = Encoder(tokenizer, special_ids(tokenizer, ()))(["ab[S]ab"])
    assert tokenizer.convert_ids_to_tokens(tokens.tolist()) == ["▁", "ab", "[S", "]", "ab"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_document_that_cannot_be_encoded_is_named(tmp_path, tokenizer, streaming):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    # A byte of the snowman.
    odd = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<0x98>", pad_token="<pad>", unk_token="<unk>")
    ids = special_ids(odd, ())
    (tmp_path / "a.txt").write_text("good\n\nalso good\n")
    (tmp_path / "b.txt").write_text("good\n\na ☃ here\n")
    corpus = CorpusOptions((str(tmp_path / "*.txt"),))
    message = r"b\.txt, document 2: the tokenizer encodes ordinary text as the special token '<0x98>'.*begins 'a ☃ here"
    stream = WindowStream(corpus, Encoder(odd, ids), 8, 0)
    read = stream.next if streaming else lambda: tokenize_corpus(corpus, odd, ids, tmp_path / "cache")
    with pytest.raises(DataError, match=message):
        read()
    with pytest.raises(SpecialTokenError) as caught:
        Encoder(odd, ids)(["a", "☃"])
    assert pickle.loads(pickle.dumps(caught.value)).document == "☃"  # it comes from other processes


def test_broken_surrogates_do_not_crash(tokenizer, ids):
    (tokens,) = Encoder(tokenizer, ids)([json.loads('"a \\ud800 b"')])
    assert len(tokens)


def test_long_documents_are_encoded_in_pieces_without_a_trace(tokenizer, ids, prose):
    text = " ".join("\n".join(prose).split())
    assert len(text) > 300_000
    assert Encoder(tokenizer, ids)([text])[0].tolist() == plain(tokenizer, text)
    pieces = split_text(text, BLANKS, True, 1000)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 1000
    assert all(p[0] == " " != p[1] for p in pieces[1:])
    assert "".join(split_text("a" + " " * 3000 + "b", BLANKS, True, 1000)) == "a" + " " * 3000 + "b"


@pytest.mark.parametrize("blanks", ["\n", " \n ", "\t", "\u3000", "\u200b"])
def test_long_documents_with_few_blanks_are_not_altered(tokenizer, ids, monkeypatch, blanks):
    monkeypatch.setattr(encode, "_PIECE", 3000)
    text = "".join(f"word{n}" + blanks * (n % 100 == 0) for n in range(2000))
    assert Encoder(tokenizer, ids)([text])[0].tolist() == plain(tokenizer, text)
    pieces = split_text(text, BLANKS, False, 3000)
    assert "".join(pieces) == text
    assert 1 < len(pieces) <= -(-len(text) // 2000)
    # One that is longer than a piece does not keep those behind it together.
    assert list(map(len, split_text("x" * 2500 + " y" * 600, BLANKS, False, 1000))) == [2500, 998, 202]


@pytest.mark.parametrize("kind", ["tokenizer", "bare_tokenizer"])
@pytest.mark.parametrize("word", ["word", "漢字", "가각", "e\u0301", "¨~=", "❤️\u200d🔥", "＜/s＞"])
@pytest.mark.parametrize("behind", ["", " end", "\u3000end <pad> "])
def test_a_word_longer_than_a_piece_keeps_its_letters(request, monkeypatch, kind, word, behind):
    monkeypatch.setattr(encode, "_PIECE", 100)
    tokenizer = request.getfixturevalue(kind)
    text = ("".join(f"{word}{n}" for n in range(60)) + behind) * 2
    pieces = split_text(text, BLANKS, True, 100)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 100
    (tokens,) = Encoder(tokenizer, special_ids(tokenizer, ()))([text])
    assert tokenizer.decode(tokens.tolist()) == tokenizer.backend_tokenizer.normalizer.normalize_str(text)


@pytest.mark.parametrize(
    ("pre_tokenizer", "normalizer"),
    [
        (pre_tokenizers.Metaspace(), None),
        (pre_tokenizers.Metaspace(prepend_scheme="first", split=False), None),
        (pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]), None),
        (
            pre_tokenizers.Split("never", "isolated"),
            normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        ),
    ],
)
def test_pieces_go_on_as_each_kind_of_tokenizer_wants(monkeypatch, pre_tokenizer, normalizer):
    text = "a bc  cb\nab\n\nc\tabc " + "abcb" * 10 + " a\u3000c abc" * 3
    vocabulary = [(p, -1.0) for p in pieces_of(text + "x")]
    tokenizer = small(models.Unigram(vocabulary, 0), pre_tokenizer, normalizer)
    assert set(PlainText(tokenizer, frozenset()).blanks) >= {*" \n\t\u3000"}
    for most in range(4, 40):
        monkeypatch.setattr(encode, "_PIECE", most)
        (found,) = Encoder(tokenizer, special_ids(tokenizer, ()))([text])
        assert found.tolist() == plain(tokenizer, text)
