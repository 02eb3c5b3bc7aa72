"""Documents in, memory-mapped ids out: what is read, what is reused, and what is refused."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest

from fat5.data import CorpusOptions, DataError, MixtureOptions, WindowDataset, special_ids, tokenize_corpus
from fat5.data.documents import read_documents
from fat5.data.encode import Encoder, encode_chunks
from fat5.data.token_store import TokenStore, store_key, write_store


@pytest.fixture
def ids(tokenizer):
    return special_ids(tokenizer, MixtureOptions().resolved())


def stored(store):
    """Every document of a store, as lists of ids."""
    return [d.tolist() for tokens, ends in store.shards() for d in np.split(tokens, ends[:-1])]


def encode(tokenizer, texts):
    return [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]


def test_text_files_by_paragraph_line_and_file(tmp_path):
    (tmp_path / "b.txt").write_text("one\ntwo\n\n \n\nthree\r\nfour\r\n")
    (tmp_path / "a.txt").write_text("zero")
    pattern = (str(tmp_path / "*.txt"),)
    assert list(read_documents(CorpusOptions(pattern))) == ["zero", "one\ntwo\n", "three\r\nfour\r\n"]
    lines = list(read_documents(CorpusOptions(pattern, documents="line")))
    assert lines == ["zero", "one", "two", "", " ", "", "three", "four"]
    assert [len(d) for d in read_documents(CorpusOptions(pattern, documents="file"))] == [4, 25]


def test_jsonl_parquet_and_datasets_give_the_same(tmp_path, prose):
    datasets = pytest.importorskip("datasets")
    texts = prose[:30]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"id": 1, "body": t}) + "\n" for t in texts))
    datasets.Dataset.from_dict({"body": texts}).to_parquet(str(tmp_path / "t.parquet"))
    folder = tmp_path / "named"
    folder.mkdir()
    shutil.copy(tmp_path / "t.parquet", folder / "train.parquet")
    for corpus in (
        CorpusOptions((str(tmp_path / "t.jsonl"),), format="jsonl", field="body"),
        CorpusOptions((str(tmp_path / "t.parquet"),), format="parquet", field="body"),
        CorpusOptions(dataset=str(folder), field="body"),
        CorpusOptions(dataset=str(folder), field="body", streaming=True),
    ):
        assert list(read_documents(corpus)) == texts


@pytest.mark.parametrize("processes", [1, 2])
def test_a_store_holds_every_documents_ids(tmp_path, prose, tokenizer, ids, processes):
    documents = [*prose[:12], "", "  ", *prose[12:40]]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    corpus = CorpusOptions((str(tmp_path / "c.jsonl"),), format="jsonl")
    seen = []
    store = tokenize_corpus(
        corpus, tokenizer, ids, tmp_path / "cache", processes=processes, progress=lambda d, t: seen.append((d, t))
    )
    expected = [e for e in encode(tokenizer, documents) if e]
    assert stored(store) == expected
    assert store.documents == len(expected) == 40
    assert store.tokens == sum(map(len, expected)) == sum(t for _, t in seen)
    assert sum(d for d, _ in seen) == 42
    assert store.dtype == np.uint16


def test_a_rerun_reuses_the_store_and_other_text_or_tokenizer_does_not(tmp_path, prose, tokenizer, bare_tokenizer, ids):
    path = tmp_path / "c.txt"
    path.write_text("\n\n".join(prose[:5]))
    corpus, cache = CorpusOptions((str(path),)), tmp_path / "cache"
    first = tokenize_corpus(corpus, tokenizer, ids, cache)

    def never(*_):
        raise AssertionError("tokenised again")

    again = tokenize_corpus(corpus, tokenizer, ids, cache, progress=never)
    assert again.folder == first.folder
    # How much of a corpus a run takes does not change its tokens.
    assert store_key(CorpusOptions((str(path),), weight=3.0), tokenizer, ids) == first.folder.name
    # A mixture with other mode tokens in free rows neither.
    plain = special_ids(tokenizer, MixtureOptions("prefix_lm").resolved(), 5000)
    assert store_key(corpus, tokenizer, plain) == first.folder.name
    keys = {
        first.folder.name,
        store_key(CorpusOptions((str(path),), documents="line"), tokenizer, ids),
        store_key(corpus, bare_tokenizer, special_ids(bare_tokenizer, ())),
    }
    path.write_text("other text")
    keys.add(store_key(corpus, tokenizer, ids))
    assert len(keys) == 4


def test_another_folder_or_file_of_the_same_name_is_another_corpus(tmp_path, monkeypatch, tokenizer, ids):
    pytest.importorskip("datasets")
    found = {}
    for place, words in (("one", "first words"), ("two", "other words")):
        (tmp_path / place / "named").mkdir(parents=True)
        path = tmp_path / place / "named" / "train.jsonl"
        path.write_text(json.dumps({"text": words}) + "\n")
        os.utime(path, ns=(10**18, 10**18))
        monkeypatch.chdir(tmp_path / place)
        for corpus in (CorpusOptions(dataset="named"), CorpusOptions(("named/train.jsonl",), format="jsonl")):
            found[place, corpus.name] = store = tokenize_corpus(corpus, tokenizer, ids, tmp_path / "cache")
            assert [tokenizer.decode(d) for d in stored(store)] == [words]
    assert len({store.folder for store in found.values()}) == 4
    os.utime(path, ns=(10**18, 10**18 + 1))
    assert store_key(CorpusOptions(dataset="named"), tokenizer, ids) != found["two", "named"].folder.name


def test_the_same_tokens_have_the_same_identity(tmp_path, tokenizer, ids):
    def identity(name, text):
        (tmp_path / name).write_text(text)
        return tokenize_corpus(CorpusOptions((str(tmp_path / name),)), tokenizer, ids, tmp_path / "cache").identity

    one = identity("a.txt", "some words\n\nand others")
    assert identity("b.txt", "some words\n\nand others\n") == one
    others = [identity(f"{n}.txt", text) for n, text in enumerate(["some words and others", "some words\n\nand other"])]
    assert len({one, *others}) == 3


def test_a_stopped_tokenisation_goes_on_behind_its_last_shard(tmp_path, prose, tokenizer, ids):
    class StoppedError(Exception):
        pass

    def stopping(documents, after):
        for n, document in enumerate(documents):
            if n == after:
                raise StoppedError
            yield document

    documents = [p[:400] for p in prose] * 30  # several groups of 1000
    encoder = Encoder(tokenizer, ids)
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    folder.mkdir()
    write_store(whole, documents, encoder, ids.vocabulary, shard_tokens=1)
    with pytest.raises(StoppedError):
        write_store(folder, stopping(documents, 1500), encoder, ids.vocabulary, shard_tokens=1)
    with pytest.raises(DataError, match="no complete tokenised corpus"):
        TokenStore(folder)
    encoded = []
    write_store(folder, documents, encoder, ids.vocabulary, shard_tokens=1, progress=lambda d, _: encoded.append(d))
    assert 0 < sum(encoded) < len(documents)
    assert stored(TokenStore(folder)) == stored(TokenStore(whole))
    assert len(TokenStore(folder).shards()) > 2


class Deadly:
    """An encoder that ends the process it comes to before all of it is read."""

    def __reduce__(self):
        return os._exit, (9,), {"padding": b"x" * (1 << 20)}


@pytest.mark.slow
def test_a_killed_encoding_process_is_told():
    with pytest.raises(DataError, match=r"a process that encodes text was ended from outside.*fewer processes"):
        list(encode_chunks([["a"]] * 9, Deadly(), processes=2))


def test_a_shard_that_was_cut_short_or_is_missing_is_refused(tmp_path, prose, tokenizer, ids):
    (tmp_path / "c.txt").write_text(prose[0])
    store = tokenize_corpus(CorpusOptions((str(tmp_path / "c.txt"),)), tokenizer, ids, tmp_path / "cache")
    path = store.folder / "shard-00000.tokens"
    os.truncate(path, path.stat().st_size - 2)
    with pytest.raises(
        DataError, match=r"shard-00000\.tokens has \d+ bytes, and its index says \d+.*tokenise the corpus"
    ):
        TokenStore(store.folder)
    path.unlink()
    with pytest.raises(DataError, match=r"shard-00000\.tokens is missing"):
        TokenStore(store.folder)
    (store.folder / "index.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match="has format 99"):
        TokenStore(store.folder)
    for damaged in (b'{"form', b"\xff\xfe", b"5"):
        (store.folder / "index.json").write_bytes(damaged)
        with pytest.raises(DataError, match="no complete tokenised corpus"):
            TokenStore(store.folder)


def test_invalid_utf8_is_refused_by_place_or_replaced(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes("é".encode() * 700_000 + b"ab\xff cd\n")
    with pytest.raises(DataError, match=r"bad\.txt is not valid UTF-8 \(about byte 1400002\).*invalid_utf8: replace"):
        list(read_documents(CorpusOptions((str(path),))))
    (text,) = read_documents(CorpusOptions((str(path),), invalid_utf8="replace"))
    assert text.endswith("ab\ufffd cd\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"t\.jsonl, line 2: not JSON that can be read"),
        ('{"body": "a"}', r"t\.jsonl, line 2: no field 'text' \(found: body\)"),
        ('{"text": 5}', r"line 2: field 'text' is int, not text"),
        ('"a"', r"line 2: no field 'text' \(found: str\)"),
        ("[" * 100_000, r"t\.jsonl, line 2: not JSON that can be read \(.*recursion"),
        ('{"text": "a", "n": ' + "1" * 5000 + "}", r"t\.jsonl, line 2: not JSON that can be read \(.*digits"),
    ],
)
def test_bad_jsonl_is_refused_by_line(tmp_path, line, message):
    (tmp_path / "t.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        list(read_documents(CorpusOptions((str(tmp_path / "t.jsonl"),), format="jsonl")))


def test_missing_sources_are_refused(tmp_path):
    with pytest.raises(DataError, match="no file matches"):
        list(read_documents(CorpusOptions((str(tmp_path / "*.txt"),))))
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="cannot load"):
        list(read_documents(CorpusOptions(dataset=str(tmp_path / "nothing"))))
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="cannot"):
        list(read_documents(CorpusOptions((str(tmp_path / "bad.parquet"),), format="parquet")))
    with pytest.raises(ValueError, match="either files or dataset"):
        CorpusOptions()


def test_a_damaged_parquet_page_is_refused_by_file(tmp_path, prose, tokenizer, ids):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "damaged.parquet"
    datasets.Dataset.from_dict({"text": prose[:50]}).to_parquet(str(path))
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff" * (len(whole) // 2) + whole[4 + len(whole) // 2 :])
    corpus = CorpusOptions((str(path),))
    with pytest.raises(DataError, match=r"damaged\.parquet, record 0: cannot be read, the file may be damaged"):
        list(read_documents(corpus))
    with pytest.raises(DataError, match=r"^[^:]*damaged\.parquet, record 0: cannot be read"):
        tokenize_corpus(corpus, tokenizer, ids, tmp_path / "cache")


def test_files_are_told_by_suffix_and_read_once_without_a_byte_order_mark(tmp_path):
    (tmp_path / "a[1].txt").write_bytes(b"\xef\xbb\xbffirst")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "second"}).encode())
    named = (str(tmp_path / "a[1].txt"), str(tmp_path / "b.*"), str(tmp_path / "*"))
    assert list(read_documents(CorpusOptions(named))) == ["first", "second"]


def test_a_corpus_without_text_is_refused(tmp_path, tokenizer, ids):
    (tmp_path / "empty.txt").write_text("\n \n\n")
    with pytest.raises(DataError, match="holds no text"):
        tokenize_corpus(CorpusOptions((str(tmp_path / "empty.txt"),)), tokenizer, ids, tmp_path / "cache")


def test_an_unwritable_cache_is_refused(tmp_path, prose, tokenizer, ids):
    (tmp_path / "c.txt").write_text(prose[0])
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match="cannot write the tokenised corpus"):
        tokenize_corpus(CorpusOptions((str(tmp_path / "c.txt"),)), tokenizer, ids, tmp_path / "cache")


def test_windows_cover_every_document_once(tmp_path, prose, tokenizer, ids):
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in prose[:50]))
    corpus = CorpusOptions((str(tmp_path / "c.jsonl"),), format="jsonl")
    store = tokenize_corpus(corpus, tokenizer, ids, tmp_path / "cache")
    windows = WindowDataset([store, store], 50)
    assert len(windows) == 2 * sum(-(-len(d) // 50) for d in stored(store))
    joined = [w["input_ids"].tolist() for w in (windows[i] for i in range(len(windows)))]
    documents = stored(store) * 2
    at = 0
    for document in documents:
        pieces = []
        while len(pieces) < len(document):
            assert len(joined[at]) == min(50, len(document) - len(pieces))
            pieces += joined[at]
            at += 1
        assert pieces == document
    assert at == len(windows)
    windows.set_epoch(4)
    assert windows[3]["index"] == 3
    assert windows[3]["epoch"] == 4
    with pytest.raises(IndexError):
        windows[len(windows)]
    copied = pickle.loads(pickle.dumps(windows))
    assert len(pickle.dumps(windows)) < 1000  # the folder, not the tokens
    assert copied[5]["input_ids"].tolist() == joined[5]
    assert copied.epoch == 4
