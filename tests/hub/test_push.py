"""`fat5convert push` against a Hub: what arrives, what stays, and what a second push does."""

import hashlib
import json

import pytest
from hub_client import READS, WRITES

from fat5.model import RUNTIME_FILES

REPO = "alice/tiny-fat5"
YES = ("--yes", "--license", "apache-2.0")


def commits(hub):
    return [r for r in hub.server.requests if r.method == "POST" and "/commit/" in r.path]


def uploads(hub):
    return [r.path.strip("/").split("/")[0] for r in hub.storage.requests if r.method == "PUT"]


def test_everything_arrives_and_the_last_line_is_the_address(hub, push, out):
    done = push(out, REPO, *YES)
    assert done.url == f"{hub.url}/{REPO}"
    repo = hub.store.repos[REPO]
    assert repo.private, "a new repo is private unless --public"
    assert repo.titles() == ["Publish with fat5convert", "initial commit"]
    files = repo.main.files
    assert set(files) - {".gitattributes", "README.md"} == {path.name for path in out.iterdir()}
    assert set(RUNTIME_FILES) <= set(files)
    for name in set(files) - {".gitattributes", "README.md"}:
        assert hub.store.content(files[name]) == (out / name).read_bytes(), name
        assert (files[name].sha256 is not None) == name.endswith(".safetensors")


def test_a_second_push_does_nothing_and_uploads_nothing(hub, push, out):
    push(out, REPO, *YES)
    assert sorted(uploads(hub)) == sorted(hub.store.large)
    hub.server.requests.clear()
    hub.storage.requests.clear()
    done = push(out, REPO, "--yes")
    assert done.url == f"{hub.url}/{REPO}"
    assert "0 files to upload" in done.out
    assert not commits(hub)
    assert not uploads(hub)


def test_a_new_version_replaces_what_is_ours_and_keeps_what_is_not(hub, push, out, published_once, tmp_path):
    from fat5convert.convert import convert

    push(out, REPO, *YES)
    old = {name: f.sha256 for name, f in hub.store.repos[REPO].main.files.items() if f.sha256}
    hub.store.edit(REPO, "samples/cat.png", b"a cat")
    hub.store.edit(REPO, "handler.py", b"# my endpoint")
    hub.store.edit(REPO, "ops_gone.py", b"# of an earlier version")
    listing = hub.store.text(REPO, "runtime_files.py").replace(
        "RUNTIME_FILES = (", 'RUNTIME_FILES = (\n    "ops_gone.py",'
    )
    hub.store.edit(REPO, "runtime_files.py", listing.encode())
    hub.storage.requests.clear()

    convert(str(published_once.with_name("tiny-t5")), tmp_path / "whole")
    done = push(tmp_path / "whole", REPO, "--yes", "--dry-run")
    deleted = {line.split()[-1] for line in done.out.splitlines() if line.startswith("  delete ")}
    assert deleted == {*old, "model.safetensors.index.json", "ops_gone.py"}
    push(tmp_path / "whole", REPO, "--yes")
    files = hub.store.repos[REPO].main.files
    assert not deleted & set(files)
    assert {"samples/cat.png", "handler.py", "model.safetensors"} <= set(files)
    assert len(uploads(hub)) == 1
    assert len(hub.store.repos[REPO].titles()) == 7, "one commit"


def test_dry_run_lists_all_and_changes_nothing(hub, push, out):
    done = push(out, REPO, "--dry-run", "--license", "mit", "--public")
    assert not hub.store.repos
    asked = {(r.method, r.path) for r in hub.server.requests if r.method != "GET"}
    assert asked == {("POST", "/api/validate-yaml")}, "which keeps nothing"
    lines = [line.split() for line in done.out.splitlines() if line.startswith("  upload")]
    listed = {line[3]: (int(line[1].replace(",", "")), line[2]) for line in lines}
    assert set(listed) == {path.name for path in out.iterdir()} | {"README.md"}
    for path in out.iterdir():
        assert listed[path.name] == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    assert "license: mit" in done.out
    assert "## How to load" in done.out
    assert "new, public" in done.out


def test_dry_run_of_a_second_push_lists_what_is_there_too(hub, push, out):
    push(out, REPO, *YES)
    again = push(out, REPO, "--dry-run")
    listed = {line.split()[-1] for line in again.out.splitlines() if line.startswith("  there")}
    assert listed == {path.name for path in out.iterdir()} | {"README.md"}
    unseen = push(out, REPO, "--dry-run", "--license", "mit", token=None)
    assert "not logged in" in unseen.err
    assert "private repo looks as if it were not there" in unseen.err


def test_a_card_that_the_hub_does_not_take_stops_before_anything_is_made(hub, push, out):
    for how in ("--dry-run", "--yes"):
        refused = push(out, REPO, how, "--license", "Apache 2", status=1)
        assert '"license" must be one of' in refused.err
        assert "--license" in refused.err
    assert not hub.store.repos


def test_only_files_of_a_repo_go_and_the_others_are_named(hub, push, out, tmp_path):
    secrets = tmp_path / "elsewhere.txt"
    secrets.write_text("secret")
    for name in (".env", "optimizer.pt", "training_args.bin", "pytorch_model.bin", "notes.txt", "odd.py"):
        (out / name).write_text("x")
    (out / "model-00009-of-00009.safetensors").write_text("x")
    for name in (".cache/huggingface", "checkpoint-10", ".git", "__pycache__"):
        (out / name).mkdir(parents=True)
    (out / "vocabulary.txt").symlink_to(secrets)
    (out / "folder").symlink_to(tmp_path)
    (out / "training.json").write_text(json.dumps({"steps": 3, "recipe": {"data": {"train": "/home/me/corpus"}}}))
    done = push(out, REPO, *YES)
    left = {line.split()[2]: line for line in done.out.splitlines() if line.startswith("  not published: ")}
    expected = {
        ".env": "secrets",
        "optimizer.pt": "state of a training run",
        "training_args.bin": "state of a training run",
        "pytorch_model.bin": "pickle",
        "notes.txt": "not among",
        "odd.py": "no part of the model's code",
        "model-00009-of-00009.safetensors": "the index does not list",
        ".cache/": "cache",
        "__pycache__/": "cache",
        ".git/": "version control",
        "checkpoint-10/": "state of a training run",
        "vocabulary.txt": "leads out of the folder",
        "folder/": "leads out of the folder",
        "training.json": "summary is in the card",
    }
    assert set(left) == set(expected)
    for name, reason in expected.items():
        assert reason in left[name]
    sent = hub.store.repos[REPO].main.files
    assert not {name.rstrip("/") for name in expected} & {name.split("/")[0] for name in sent}
    assert "/home/me" not in hub.store.text(REPO, "README.md")


def test_pull_request_branch_and_visibility(hub, push, out):
    assert "no such repo" in push(out, REPO, *YES, "--create-pr", status=1).err
    push(out, REPO, *YES, "--public")
    repo = hub.store.repos[REPO]
    assert not repo.private
    assert "is there and public" in push(out, REPO, *YES, "--private", status=1).err

    assert push(out, REPO, "--yes", "--revision", "v2").url == f"{hub.url}/{REPO}/tree/v2"
    assert repo.refs["v2"] == repo.refs["main"], "a branch of the same content"
    (out / "NOTICE").write_text("notice")
    push(out, REPO, "--yes", "--revision", "v2")
    assert "NOTICE" in repo.at("v2").files
    assert "NOTICE" not in repo.main.files

    url = push(out, REPO, "--yes", "--create-pr", "--commit-message", "Add a notice").url
    assert url == f"{hub.url}/{REPO}/discussions/1"
    assert push(out, REPO, "--yes", "--create-pr", "--commit-message", "Add a notice").url == url, "not a second one"
    assert [pr.title for pr in repo.pull_requests] == ["Add a notice"]
    assert "NOTICE" in repo.at("refs/pr/1").files
    assert "NOTICE" not in repo.main.files
    (out / "NOTICE").write_text("a longer notice")
    assert "has no refs/pr/7" in push(out, REPO, "--yes", "--revision", "refs/pr/7", status=1).err
    assert "refs/pr/7" not in repo.refs
    push(out, REPO, "--yes", "--revision", "refs/pr/1")
    assert hub.store.text(REPO, "NOTICE", "refs/pr/1") == "a longer notice"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["{repo}", "{out}"], 2, "the folder comes first: fat5convert push {out} {repo}"),
        (["{out}", "{repo}", "--create-pr", "--revision", "x"], 2, "not both"),
        (["{out}-not-there", "{repo}", "--yes"], 1, "no such folder"),
        (["{out}", "just-a-name", "--yes"], 1, "write owner/name"),
        (["{out}", "{repo}", "--revision", "0" * 40], 1, "name a branch"),
        (["{out}", "{repo}", "--license", "mit"], 1, "give --yes"),
        (["{out}", "{repo}", "--yes"], 1, "give it by --license"),
        (["{out}", "{repo}", "--token-from-env"], 1, "HF_TOKEN is not set"),
    ],
)
def test_wrong_usage_is_explained(hub, push, out, arguments, status, message):
    filled = [argument.format(out=out, repo=REPO) for argument in arguments]
    done = push(*filled, status=status)
    assert message.format(out=out, repo=REPO) in " ".join(done.err.split())
    assert not hub.store.repos


def test_at_a_terminal_it_asks(hub, push, out):
    """For the licence that no card states, and before it begins."""
    declined = push(out, REPO, typed="mit\nn\n", status=1)
    assert "Which is it" in declined.err
    assert "Push?" in declined.out + declined.err
    assert not hub.store.repos
    push(out, REPO, typed="mit\ny\n")
    assert "license: mit" in hub.store.text(REPO, "README.md")
    hub.store.edit(REPO, "model.safetensors", b"of an earlier push")
    asked = push(out, REPO, typed="n\n", status=1)
    assert "  delete model.safetensors" in asked.out, "before the question"
    assert "model.safetensors" in hub.store.repos[REPO].main.files


def test_logins(hub, push, out):
    nobody = push(out, REPO, *YES, token=None, status=1)
    assert "hf auth login" in nobody.err
    assert "read" in push(out, REPO, *YES, token=READS, status=1).err
    assert "expired or revoked" in push(out, REPO, *YES, token="hf_of_nobody", status=1).err
    hub.store.expired.add("hf_alice_wrote")
    assert 'Token "laptop" is expired' in push(out, REPO, *YES, token="hf_alice_wrote", status=1).err
    forbidden = push(out, REPO, *YES, token="hf_bob_writes", status=1)
    assert "write access to alice" in forbidden.err
    assert not hub.store.repos
    push(out, REPO, *YES, "--token-from-env", token=READS, HF_TOKEN=f"{WRITES}\n")
    assert REPO in hub.store.repos


def test_a_private_repo_of_others_is_as_one_that_is_not_there(hub, push, out):
    hub.store.create("bob/secret", "bob", private=True)
    assert "write access to bob" in push(out, "bob/secret", *YES, status=1).err
    hub.store.create("bob/open", "bob", private=False)
    refused = push(out, "bob/open", *YES, status=1)
    assert "write access to bob" in refused.err
    assert push(out, "bob/open", *YES, "--create-pr").url.endswith("/bob/open/discussions/1")


def test_the_token_goes_nowhere_else(hub, push, out, tmp_path):
    """Not to the storage, into no output, and into no file."""
    done = [
        push(out, REPO, *YES, HF_DEBUG="1", HF_HUB_VERBOSITY="debug"),
        push(out, REPO, "--yes", "--dry-run"),
        push(out, "bob/x", *YES, status=1),
    ]
    assert hub.storage.requests
    for request in hub.storage.requests:
        assert WRITES not in json.dumps(request.headers), request.path
        assert WRITES.encode() not in request.body
    assert any(request.token == WRITES for request in hub.server.requests)
    for request in hub.server.requests:
        assert WRITES.encode() not in request.body
        assert WRITES not in request.path + json.dumps(request.query)
    assert all(WRITES not in text for one in done for text in (one.out, one.err))
    for spoilt in ("hf_alice\nhalf_of_it", "hf_alice half_of_it", "hf_\xe9_half_of_it"):
        refused = push(out, REPO, *YES, "--token-from-env", status=1, HF_TOKEN=spoilt)
        assert "copy it again" in refused.err
        assert "half_of_it" not in refused.out + refused.err
    for path in [*out.rglob("*"), *push.home.rglob("*")]:
        assert not path.is_file() or path.name == "token" or WRITES.encode() not in path.read_bytes(), path


def test_help_has_examples(push):
    text = push("--help").out
    assert text.count("fat5convert push ") >= 3
