"""What becomes of a repo: loaded, trained, saved and pushed again in every way, it always keeps its code."""

import json
from pathlib import Path

import pytest
import transformers

import fat5.model
from fat5.model import AUTO_MAP, RUNTIME_FILES
from fat5convert.convert import convert

REPO, MINE = "alice/tiny-fat5", "alice/mine"
HEADLESS_AND_HEADS = [
    "T5EncoderModel",
    "T5ForSequenceClassification",
    "T5ForTokenClassification",
    "T5ForQuestionAnswering",
]


@pytest.fixture
def repo(hub, push, out):
    push(out, REPO, "--yes", "--license", "mit", "--public")
    return hub.store.repos[REPO]


def assert_whole(hub, repo_id, revision="main"):
    files = hub.store.repos[repo_id].at(revision).files
    assert set(RUNTIME_FILES) <= set(files)
    for name in RUNTIME_FILES:
        assert hub.store.text(repo_id, name, revision) == hub.store.text(REPO, name)
    config = json.loads(hub.store.text(repo_id, "config.json", revision))
    assert config["auto_map"] == AUTO_MAP
    assert config["architectures"] == ["FlashT5ForConditionalGeneration"]


def test_loads_and_generates(hub, user, repo):
    user("check", repo=REPO, token=None)
    assert any(request.method == "GET" for request in hub.storage.requests), "the weights came from the storage"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["save_and_push", "train_and_push", "merge_and_push", "shard_and_push"])
def test_saved_and_pushed_again(hub, user, repo, tmp_path, way):
    folder = {"folder": str(tmp_path / "run")} if way in ("train_and_push", "shard_and_push") else {}
    kept = str(tmp_path / "logits.pt")
    user(way, repo=REPO, target=MINE, file=kept, **folder)
    assert_whole(hub, MINE)
    user("check", repo=MINE, file=kept, tokenizer=way in ("save_and_push", "train_and_push"))


def test_every_intermediate_push_of_a_trainer_loads(hub, user, repo, tmp_path):
    kept = str(tmp_path / "logits.pt")
    user("train_pushing_every_save", repo=REPO, target=MINE, file=kept, folder=str(tmp_path / "run"))
    commits = [c for c in hub.store.repos[MINE].commits.values() if "config.json" in c.files]
    assert len(commits) == 2
    for commit in commits:
        assert_whole(hub, MINE, commit.oid)
    user("check", repo=MINE, file=kept)


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *HEADLESS_AND_HEADS])
def test_what_the_card_says_of_loading_works(hub, push, user, repo, tmp_path, name):
    """Of every kind of model, since each has an auto-class of its own."""
    if name is not None:
        push(write_converted(tmp_path, name), MINE, "--yes", "--license", "mit", "--public")
    user("run_card", repo=REPO if name is None else MINE)


def write_converted(folder: Path, name: str) -> Path:
    sizes = {"vocab_size": 384, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = getattr(transformers, name)(transformers.T5Config(**sizes, decoder_start_token_id=0))
    model.save_pretrained(folder / "stock")
    transformers.ByT5Tokenizer().save_pretrained(folder / "stock")
    convert(str(folder / "stock"), folder / "fat5")
    return folder / "fat5"


@pytest.mark.slow
def test_code_of_another_revision(hub, user, repo, tmp_path):
    pinned = repo.refs["main"]
    newer = hub.store.text(REPO, "modeling_flash_t5.py") + "\nraise RuntimeError('the newer code')\n"
    hub.store.edit(REPO, "modeling_flash_t5.py", newer.encode())
    kept = str(tmp_path / "logits.pt")
    user("pin_and_push", repo=REPO, target=MINE, file=kept, code=pinned)
    hub.store.repos[REPO].refs["main"] = pinned
    assert_whole(hub, MINE)
    user("check", repo=MINE, file=kept, tokenizer=False)


@pytest.mark.slow
def test_registered_classes(hub, user, repo, tmp_path):
    """Of those who have FAT5 installed and use the auto-classes without remote code."""
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    AutoConfig.register("flash_t5", fat5.model.FlashT5Config)
    AutoModelForSeq2SeqLM.register(fat5.model.FlashT5Config, fat5.model.FlashT5ForConditionalGeneration)
    try:
        config = AutoConfig.for_model("flash_t5", vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        model = AutoModelForSeq2SeqLM.from_config(config).eval()
        model.save_pretrained(tmp_path / "model")
    finally:
        del CONFIG_MAPPING._extra_content["flash_t5"]
        del AutoModelForSeq2SeqLM._model_mapping._extra_content[fat5.model.FlashT5Config]
    ids = torch.arange(3, 27).view(2, 12)
    torch.save(model(input_ids=ids, decoder_input_ids=ids[:, :5]).logits.detach(), tmp_path / "logits.pt")
    user("upload", folder=str(tmp_path / "model"), target=MINE)
    assert_whole(hub, MINE)
    user("check", repo=MINE, file=str(tmp_path / "logits.pt"), tokenizer=False)


@pytest.mark.slow
def test_a_private_repo_loads_with_its_owner_s_token(hub, push, user, out):
    push(out, REPO, "--yes", "--license", "mit", "--private")
    user("check", repo=REPO)
    downloads = [request for request in hub.storage.requests if request.method == "GET"]
    assert downloads
    assert all(request.token is None for request in downloads), "the token went to another origin"
    with pytest.raises(AssertionError, match=r"gated repo|not a valid model identifier|401"):
        user("check", repo=REPO, token=None)


@pytest.mark.slow
def test_revisions_and_pull_requests_load(hub, push, user, repo, out):
    (out / "NOTICE").write_text("notice")
    push(out, REPO, "--yes", "--revision", "v2")
    push(out, REPO, "--yes", "--create-pr")
    user("check", repo=REPO, revision="v2")
    user("check", repo=REPO, revision="refs/pr/1")
