"""The card: what it says, and that what people write into it stays."""

import json
import re

import pytest
from huggingface_hub import ModelCard

from fat5convert.errors import ConvertError
from fat5convert.publish import card as cards
from fat5convert.publish.origin import find_origin
from fat5convert.publish.preflight import check
from fat5convert.publish.sections import sections

REPO = "alice/tiny-fat5"
BASE = "somebody/tiny-t5"
REVISION = "0123456789abcdef0123456789abcdef01234567"
BASE_CARD = (
    "---\nlicense: other\nlicense_name: old-free\nlicense_link: LICENCE\nlanguage:\n- fr\n- oc\n---\n# Tiny T5\n"
)
APACHE = cards.Licence("apache-2.0")


@pytest.fixture
def loads(monkeypatch):
    monkeypatch.setattr("fat5convert.publish.preflight.check_loading", lambda *args, **kwargs: None)


@pytest.fixture
def ready(out, loads):
    return check(out)


def from_hub(folder, **changes):
    """Make a folder look as if it came from the Hub."""
    path = folder / "conversion.json"
    conversion = json.loads(path.read_text())
    conversion["source"] |= {"name": BASE, "revision": REVISION}
    path.write_text(json.dumps(conversion | changes))


def write(ready, present=None, licence=APACHE, base=None):
    origin = find_origin(ready, BASE.__eq__)
    texts = sections(ready, origin, REPO, {"model-00001-of-00003.safetensors": "ab" * 32})
    return cards.write(ready, origin, texts, licence, base, present)


def test_what_it_says_of_a_conversion(out, loads):
    from_hub(out)
    base = ModelCard(BASE_CARD)
    ready = check(out)
    card = write(ready, licence=cards.licence_of(None, base), base=base)
    facts = card.data.to_dict()
    assert (facts["base_model"], facts["base_model_relation"]) == (BASE, "quantized")
    assert (facts["license"], facts["license_name"], facts["license_link"]) == ("other", "old-free", "LICENCE")
    assert facts["language"] == ["fr", "oc"]
    assert (facts["library_name"], facts["pipeline_tag"]) == ("transformers", "text-generation")
    assert {"fat5", "t5"} <= set(facts["tags"])
    text = card.text
    assert f"[{BASE}](https://huggingface.co/{BASE}) at `{REVISION}`" in text
    assert "`" + "ab" * 32 + "`" in text
    assert "The conversion rounded nothing" in text
    assert f'AutoModelForSeq2SeqLM.from_pretrained("{REPO}", trust_remote_code=True)' in text
    tensors = json.loads((out / "parity.json").read_text())["tensors"]
    assert f"{tensors['compared']} tensors compared with the source's: {tensors['identical']} bit-identical" in text
    for implementation in json.loads((out / "parity.json").read_text())["models"]["implementations"]:
        assert re.search(rf"\| {implementation['attn_implementation']} \| .* \| identical \|", text)
    assert "## Training" not in text
    assert str(ModelCard(str(card))) == str(card)


def test_what_it_says_of_rounding(out, loads):
    errors = {
        "a": {"max_relative": 1e-3, "rms_relative": 2e-4, "overflows": 0, "underflows": 0},
        "b": {"max_relative": 4e-3, "rms_relative": 3e-4, "overflows": 0, "underflows": 7},
        "c": {"max_relative": 0.0, "rms_relative": 0.0, "overflows": 0, "underflows": 0},
    }
    from_hub(out, rounding=errors)
    text = write(check(out)).text
    assert "The conversion rounded 2 tensors" in text
    assert text.index("| `b` | 4.00e-03 | 3.00e-04 | 0 | 7 |") < text.index("| `a` | 1.00e-03")


def test_what_it_says_of_training(out, loads):
    (out / "parity.json").unlink()
    (out / "conversion.json").unlink()
    (out / "loss.png").write_bytes(b"a picture")
    run = {
        "steps": 2000,
        "first_evaluation": {"step": 0, "eval_loss": 3.25, "eval_loss_se": 0.01, "eval_R_loss": 3.0},
        "last_evaluation": {"step": 2000, "eval_loss": 2.5, "eval_loss_se": 0.02, "eval_R_loss": 2.0},
        "recipe": {"model": {"path": BASE, "revision": None}, "training": {"optimizer": "adamw_scale", "seed": 3}},
        "versions": {"fat5": "0.1.0"},
    }
    (out / "training.json").write_text(json.dumps(run))
    card = write(check(out))
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert card.data.to_dict()["base_model"] == BASE
    assert "| all denoisers | 3.2500 ± 0.0100 | 2.5000 ± 0.0200 |" in card.text
    assert "| R | 3.0000 | 2.0000 |" in card.text
    assert "2,000 steps" in card.text
    assert "(loss.png)" in card.text
    run["recipe"]["model"]["path"] = "runs/flan-fat5"  # a folder that is not here any more
    (out / "training.json").write_text(json.dumps(run))
    gone = write(check(out))
    assert "base_model" not in gone.data.to_dict()
    assert "`flan-fat5`" in gone.text
    assert "runs/" not in gone.text
    run["recipe"]["model"]["fresh"] = {"num_layers": 2}
    (out / "training.json").write_text(json.dumps(run))
    fresh = write(check(out))
    assert "base_model" not in fresh.data.to_dict()
    assert "pretrained from scratch" in fresh.text


@pytest.mark.parametrize(
    ("architecture", "auto", "base", "tag"),
    [
        ("FlashT5ForConditionalGeneration", "AutoModelForSeq2SeqLM", "translation", "translation"),
        ("FlashT5ForConditionalGeneration", "AutoModelForSeq2SeqLM", "text2text-generation", "text-generation"),
        ("FlashT5EncoderModel", "AutoModelForTextEncoding", "text-to-image", "feature-extraction"),
        ("FlashT5EncoderModel", "AutoModelForTextEncoding", "sentence-similarity", "sentence-similarity"),
        ("FlashT5ForSequenceClassification", "AutoModelForSequenceClassification", None, "text-classification"),
        ("FlashT5ForTokenClassification", "AutoModelForTokenClassification", "translation", "token-classification"),
        ("FlashT5ForQuestionAnswering", "AutoModelForQuestionAnswering", None, "question-answering"),
    ],
)
def test_every_kind_of_model_is_loaded_whole(out, loads, architecture, auto, base, tag):
    """By the class that has its head; a slow test in test_life_after_push does what the card says."""
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    card = write(
        check(out), base=ModelCard(f"---\npipeline_tag: {base}\n---\n" if base else "---\nlanguage: fr\n---\n")
    )
    assert f'model = {auto}.from_pretrained("{REPO}"' in card.text
    assert card.data.to_dict()["pipeline_tag"] == tag


def test_a_licence_that_is_not_stated_is_not_taken():
    for stated in ("license:", "license: unknown", "language: fr"):
        assert cards.licence_of(ModelCard(f"---\n{stated}\ntags: [a]\n---\n")) is None


def test_a_source_on_disk_is_named_and_not_linked(ready):
    card = write(ready)
    assert "`tiny-t5`" in card.text
    assert "base_model" not in card.data.to_dict()
    assert str(ready.folder.parent) not in str(card)


def test_writing_it_again_changes_nothing(ready):
    first = str(write(ready))
    assert str(write(ready, present=ModelCard(first))) == first
    crlf = first.replace("\n", "\r\n")
    assert str(write(ready, present=ModelCard(crlf))).replace("\r\n", "\n") == first


def test_what_people_write_stays(ready):
    first = str(write(ready))
    mine = first.replace("## How to load", "## How to load it, by me").replace("tags:", "thumbnail: cat.png\ntags:")
    mine = mine.replace("license: apache-2.0", "license: mit") + "\n## Evaluation\n\nMine.\n"
    before = mine.index("<!-- fat5:begin provenance")
    mine = mine[:before] + "A paragraph of mine.\n\n" + mine[before:]
    stale = mine.replace("tensors compared", "tensors once compared")
    present = ModelCard(stale)
    assert cards.edited(present) == ["load", "parity"]
    again = write(ready, present=present, licence=cards.licence_of(present))
    assert again.text == present.text
    assert again.data.to_dict()["license"] == "mit"
    assert again.data.to_dict()["thumbnail"] == "cat.png"


def test_what_is_generated_follows_the_weights(ready, out, loads):
    first = ModelCard(str(write(ready)) + "\nMine.\n")
    from_hub(out)
    second = write(check(out), present=first)
    assert "`tiny-t5`" not in second.text
    assert second.text.count("## Provenance") == 1
    assert second.text.endswith("Mine.\n")
    assert second.data.to_dict()["base_model"] == BASE


def test_a_card_without_our_sections_keeps_its_text_on_top(ready):
    card = write(ready, present=ModelCard("---\ntags:\n- mine\n---\n# My model\n\nMy words.\n"))
    assert card.text.startswith("# My model\n\nMy words.\n\n<!-- fat5:begin about ")
    assert card.data.to_dict()["tags"] == ["mine", "fat5", "t5"]


def test_a_card_that_cannot_be_read_is_named():
    with pytest.raises(ConvertError, match=r"alice/x/README\.md: the metadata on top cannot be read"):
        cards.parse("---\na: [\n---\n", "alice/x/README.md")


def test_other_people_s_broken_cards_do_not_stop_a_push_and_ours_do(hub, push, out):
    base = hub.store.create(BASE, "somebody", private=False)
    hub.store.edit(BASE, "README.md", b"---\nlicense: [\n---\n")
    from_hub(out)
    path = out / "conversion.json"
    path.write_text(path.read_text().replace(REVISION, base.refs["main"]))
    assert "states no licence, or cannot be seen" in push(out, REPO, "--yes", status=1).err
    (out / "README.md").write_bytes(b"caf\xe9")
    assert "README.md: is not text in UTF-8" in push(out, REPO, "--yes", "--license", "mit", status=1).err
    (out / "README.md").write_bytes(b"\xef\xbb\xbf---\ntags: [mine]\n---\nMy words.\n")
    push(out, REPO, "--yes", "--license", "mit")
    card = ModelCard(hub.store.text(REPO, "README.md"))
    assert "mine" in card.data.tags
    assert card.text.startswith("My words.")


def test_the_licence_and_edits_come_from_the_hub(hub, push, out):
    """The base model's card there states the licence; the second push keeps what was edited there."""
    base = hub.store.create(BASE, "somebody", private=False)
    hub.store.edit(BASE, "README.md", BASE_CARD.encode())
    conversion = json.loads((out / "conversion.json").read_text())
    conversion["source"] |= {"name": BASE, "revision": base.refs["main"]}
    (out / "conversion.json").write_text(json.dumps(conversion))
    (out / "README.md").write_text("# Mine\n\nWritten before the first push.\n")
    push(out, REPO, "--yes")
    first = hub.store.text(REPO, "README.md")
    assert "license_name: old-free" in first
    assert "Written before the first push." in first
    hub.store.edit(REPO, "README.md", first.replace("## Limits", "## Limits, as I see them").encode())
    done = push(out, REPO, "--yes")
    assert "section 'limits' was edited by hand and stays" in done.out
    assert "0 files to upload" in done.out
    assert "## Limits, as I see them" in hub.store.text(REPO, "README.md")
