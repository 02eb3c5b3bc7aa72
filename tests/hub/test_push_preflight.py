"""What is refused before anything is sent, and that a repo is loaded as others will."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer

from fat5convert.errors import ConvertError
from fat5convert.publish import load_check
from fat5convert.publish.load_once import check_vocabulary
from fat5convert.publish.preflight import check
from fat5convert.publish.sections import sections


@pytest.fixture
def loads(monkeypatch):
    monkeypatch.setattr("fat5convert.publish.preflight.check_loading", lambda *args, **kwargs: None)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(out) -> str:
    with pytest.raises(ConvertError) as caught:
        check(out)
    return str(caught.value)


def change_a_weight(out):
    path = out / "model-00001-of-00003.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    return name


def test_code_that_is_missing_or_elsewhere(out, loads):
    (out / "position_bias.py").unlink()
    assert "position_bias.py is missing" in refused(out)
    auto_map = json.loads((out / "config.json").read_text())["auto_map"]
    edit(out / "config.json", auto_map=auto_map | {"AutoModel": "other/repo--modeling_flash_t5.FlashT5Model"})
    assert "which is not a file of this folder" in refused(out)
    edit(out / "config.json", auto_map=auto_map | {"AutoModel": "modeling_flash_t5.FlashT6Model"})
    assert "has no FlashT6Model" in refused(out)
    edit(out / "config.json", auto_map=auto_map, architectures=[])
    assert "no entry of auto_map is the architecture" in refused(out)
    path = out / "ops_rms_norm.py"
    path.write_text(path.read_text() + "\nimport einops\n")
    assert "ops_rms_norm.py imports einops" in refused(out)
    edit(out / "config.json", auto_map=None)
    assert "no auto_map" in refused(out)


def test_weights_and_certificate(out, loads):
    name = change_a_weight(out)
    assert f"parity.json is not of these weights (tensor {name})" in refused(out)
    edit(out / "parity.json", result="different")
    assert "differs from its source" in refused(out)
    (out / "parity.json").unlink()
    assert "parity.json is missing: run `fat5convert verify" in refused(out)
    (out / "training.json").write_text("{}")
    check(out)  # trained since by `fat5 pretrain`
    (out / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in refused(out)


def test_a_tokenizer_that_the_source_had(out, loads):
    tokenizer = [path for path in out.iterdir() if "token" in path.name and path.name != "generation_config.json"]
    for path in tokenizer:
        path.unlink()
    assert "there is no tokenizer" in refused(out)
    conversion = json.loads((out / "conversion.json").read_text())
    kept = {name: digest for name, digest in conversion["files"].items() if "token" not in name}
    edit(out / "conversion.json", files=kept)
    assert not check(out).tokenizer


def test_an_index_that_does_not_fit_the_shards(out, loads):
    path = out / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    places = index["weight_map"]
    first, *_, last = sorted(places, key=places.get)
    path.write_text(json.dumps(index | {"weight_map": places | {first: places[last]}}))
    assert f"does not say in which shard tensor {first} is" in refused(out)
    path.write_text(json.dumps(index | {"weight_map": {name: at for name, at in places.items() if name != first}}))
    assert f"does not say in which shard tensor {first} is" in refused(out)
    path.write_text(json.dumps(index | {"weight_map": places | {"extra.weight": places[last]}}))
    assert "lacks tensor extra.weight" in refused(out)


@pytest.mark.parametrize("name", ["generation_config.json", "added_tokens.json", "tokenizer_config.json"])
def test_a_file_that_the_conversion_wrote_and_is_gone(out, loads, name):
    (out / name).unlink()
    assert f"{name} is missing, which the conversion wrote" in refused(out)


def test_a_tokenizer_without_its_vocabulary(out, tmp_path):
    """Which transformers 5 makes without complaint, of a hundred tokens."""
    check_vocabulary(ByT5Tokenizer(), tmp_path)
    stub = SimpleNamespace(vocab_files_names={"vocab_file": "spiece.model", "tokenizer_file": "tokenizer.json"})
    with pytest.raises(ValueError, match=r"no vocabulary: none of spiece\.model, tokenizer\.json"):
        check_vocabulary(stub, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    check_vocabulary(stub, tmp_path)


@pytest.mark.slow
def test_a_trained_model_that_lost_its_vocabulary(out):
    (out / "conversion.json").unlink()
    (out / "parity.json").unlink()
    (out / "added_tokens.json").unlink()
    (out / "training.json").write_text("{}")
    (out / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    assert "does not load" in refused(out)


MALFORMED = [
    ("parity.json", {"models": {"implementations": 1}}),
    ("conversion.json", {"rounding": {"shared.weight": {}}}),
    ("conversion.json", {"source": []}),
    ("training.json", {"steps": "many"}),
    ("training.json", {"first_evaluation": {"eval_loss": None}, "last_evaluation": {"eval_loss": None}}),
]


@pytest.mark.parametrize(("name", "changes"), MALFORMED)
def test_figures_that_no_card_can_be_made_of_are_named(out, loads, name, changes):
    known = json.loads((out / name).read_text()) if (out / name).exists() else {}
    (out / name).write_text(json.dumps(known | changes))
    ready = check(out)
    with pytest.raises(ConvertError, match=rf"{name}: is not as FAT5 writes it"):
        sections(ready, None, "alice/x", {})


def test_links_and_what_is_no_fat5(out, loads, tmp_path):
    (out / "generation_config.json").rename(tmp_path / "elsewhere.json")
    (out / "generation_config.json").symlink_to(tmp_path / "elsewhere.json")
    assert "generation_config.json: a link that leads out of the folder" in refused(out)
    (out / "generation_config.json").unlink()
    (out / ".env").write_text("secret")
    (out / "generation_config.json").symlink_to(out / ".env")
    assert "generation_config.json: a link to .env, which is not published" in refused(out)
    edit(out / "config.json", model_type="t5")
    assert "convert it first" in refused(out)


@pytest.mark.slow
def test_it_is_loaded_in_a_fresh_process(out, monkeypatch):
    """Of exactly the files that go, with no token in its environment."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    path = out / "ops_rms_norm.py"
    path.write_text('import os\nassert not [k for k in os.environ if k.startswith("HF_TOKEN")]\n' + path.read_text())
    check(out)


@pytest.mark.slow
def test_a_repo_that_needs_fat5_is_refused(out):
    path = out / "ops_rms_norm.py"
    path.write_text(path.read_text() + "\n__import__('fat5.model')\n")  # as no reading of the imports finds it
    assert "does not load where only torch and transformers are installed" in (message := refused(out))
    assert "fat5" in message


@pytest.mark.slow
def test_a_large_one_is_held_against_an_outline(out, monkeypatch):
    monkeypatch.setattr(load_check, "_LARGE", 1000)
    check(out)
    path = out / "model-00001-of-00003.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name] = torch.zeros(3, 3)
    save_file(tensors, path, metadata={"format": "pt"})
    (out / "parity.json").unlink()
    (out / "training.json").write_text("{}")
    assert f"{name} has shape [3, 3] in the files" in refused(out)
