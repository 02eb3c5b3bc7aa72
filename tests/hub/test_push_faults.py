"""What goes wrong on the way: it ends in success, or in a message and a state from which the same command goes on."""

import json

import pytest
from hub_client import WRITES
from hub_http import Answer, Fault

from fat5convert.errors import ConvertError
from fat5convert.publish.hub_errors import explained

REPO = "alice/tiny-fat5"
YES = ("--yes", "--license", "apache-2.0")
SLOW = pytest.mark.slow
COMMIT = r"/commit/"


def complete(hub, out) -> bool:
    files = hub.store.repos[REPO].main.files
    return all(name in files and hub.store.content(files[name]) == data for name, data in contents(out).items())


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def uploads(hub):
    return [r.path for r in hub.storage.requests if r.method == "PUT" and len(r.body)]


@pytest.mark.parametrize(
    ("where", "fault"),
    [
        ("server", Fault("POST", COMMIT, 500)),
        pytest.param("server", Fault("POST", COMMIT, 503, times=3), marks=SLOW),
        pytest.param("server", Fault("POST", COMMIT, "drop"), marks=SLOW),
        ("server", Fault("POST", COMMIT, "lose")),
        pytest.param("storage", Fault("PUT", r"/\w+", 500), marks=SLOW),
        ("storage", Fault("PUT", r"/\w+", "drop")),
        pytest.param("storage", Fault("PUT", r"/\w+", "lose"), marks=SLOW),
        ("server", Fault("POST", r"/batch", 502)),
        pytest.param("server", Fault("POST", r"/lfs/verify", 500), marks=SLOW),
        pytest.param("server", Fault("POST", r"/preupload/", "drop"), marks=SLOW),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.path}-{value.kind}",
)
def test_passing_faults_end_in_success(hub, push, out, where, fault):
    getattr(hub, where).faults.append(fault)
    assert push(out, REPO, *YES).url == f"{hub.url}/{REPO}"
    assert fault.times == 0
    assert complete(hub, out)
    assert hub.store.repos[REPO].titles() == ["Publish with fat5convert", "initial commit"], "one commit"
    if where == "server":
        assert len(uploads(hub)) == len(set(uploads(hub))) == 3, "nothing is uploaded twice"


LASTING = [
    pytest.param(Fault("POST", COMMIT, 500, times=4), "fails", marks=SLOW),
    pytest.param(Fault("POST", COMMIT, "drop", times=4), "fails", marks=SLOW),
    (Fault("POST", COMMIT, 403), "write access to alice"),
    (Fault("POST", COMMIT, 401), "expired or revoked"),
    (Fault("POST", COMMIT, 413), "no room"),
    pytest.param(Fault("POST", COMMIT, 400), "the Hub refuses", marks=SLOW),
    pytest.param(Fault("POST", "/repos/create", 500), "fails", marks=SLOW),
    pytest.param(Fault("GET", "/whoami", "drop"), "fails", marks=SLOW),
    pytest.param(Fault("POST", "/validate-yaml", 401), "expired or revoked", marks=SLOW),
]


@pytest.mark.parametrize(
    ("fault", "message"), LASTING, ids=lambda v: f"{v.path}-{v.kind}" if isinstance(v, Fault) else ""
)
def test_lasting_faults_are_explained_and_the_same_command_goes_on(hub, push, out, fault, message):
    fault = Fault(fault.method, fault.path, fault.kind, fault.times)
    hub.server.faults.append(fault)
    failed = push(out, REPO, *YES, status=1)
    assert message in failed.err.splitlines()[-1]
    assert REPO not in hub.store.repos or len(hub.store.repos[REPO].titles()) == 1, "all or nothing"
    assert push(out, REPO, *YES).url == f"{hub.url}/{REPO}"
    assert complete(hub, out)
    assert len(uploads(hub)) == 3, "what had arrived was not uploaded again"


def test_a_full_repo_says_so_and_goes_on_when_there_is_room(hub, push, out):
    hub.store.capacity = 150_000
    assert "no room left" in push(out, REPO, *YES, status=1).err
    hub.store.capacity = None
    push(out, REPO, *YES)
    assert complete(hub, out)


@pytest.mark.parametrize(
    ("cause", "message"), [(ConnectionResetError("reset"), "cannot be reached or fails"), (None, "the upload failed")]
)
def test_an_upload_s_own_error_says_to_go_on(cause, message):
    """Which is raised from the network's for LFS, and from nothing for Xet."""
    with pytest.raises(ConvertError, match=rf"{message}.*Give the same command again"), explained(REPO, WRITES):
        raise RuntimeError("Error while uploading") from cause


def test_a_message_that_quotes_the_token_is_shown_without_it(hub, push, out):
    hub.answering = lambda request: Answer.error(403, f"{request.token} has no right to that")
    try:
        failed = push(out, REPO, *YES, status=1)
    finally:
        hub.answering = None
    assert "*** has no right to that" in failed.err
    assert WRITES not in failed.out + failed.err


def test_a_rate_limit_is_not_taken_for_a_full_repo(hub, push, out):
    """The Hub's words for it have a quota in them as well."""
    limited = Answer.error(
        429, "We had to rate limit you, you hit the quota of 1000 api requests per 5 minutes period."
    )
    hub.answering = lambda request: limited
    try:
        failed = push(out, REPO, *YES, status=1)
    finally:
        hub.answering = None
    assert "no room" not in failed.err
    assert "Give the same command again" in failed.err


@pytest.mark.parametrize("file", ["README.md", pytest.param("runtime_files.py", marks=SLOW)])
def test_what_does_not_come_down_is_not_taken_for_missing(hub, push, out, file):
    """Else a card that people have edited would be written anew, and old code would stay."""
    hub.store.create(REPO, "alice", private=True)
    hub.store.edit(REPO, "README.md", b"My words.\n")
    hub.store.edit(REPO, "runtime_files.py", b'RUNTIME_FILES = ("ops_gone.py",)\n')
    hub.store.edit(REPO, "ops_gone.py", b"# of an earlier version")
    hub.server.faults.append(Fault("HEAD", f"{REPO}/resolve/.*/{file}", 403))
    push(out, REPO, *YES, status=1)
    assert len(hub.store.repos[REPO].titles()) == 4
    push(out, REPO, *YES)
    assert "My words." in hub.store.text(REPO, "README.md")
    assert "ops_gone.py" not in hub.store.repos[REPO].main.files


@SLOW
def test_a_base_model_s_card_that_does_not_come_down_is_not_taken_for_missing(hub, push, out):
    base = "somebody/tiny-t5"
    commit = hub.store.create(base, "somebody", private=False).refs["main"]
    conversion = json.loads((out / "conversion.json").read_text())
    conversion["source"] |= {"name": base, "revision": commit}
    (out / "conversion.json").write_text(json.dumps(conversion))
    hub.server.faults.append(Fault("HEAD", f"{base}/resolve/", 400))
    failed = push(out, REPO, *YES, status=1)
    assert "the Hub refuses" in failed.err
    assert REPO not in hub.store.repos
    push(out, REPO, *YES)
    assert f"base_model: {base}" in hub.store.text(REPO, "README.md"), "there is no card, which is no fault"


def test_a_lost_answer_opens_no_second_pull_request(hub, push, out):
    push(out, REPO, *YES)
    (out / "NOTICE").write_text("notice")
    hub.server.faults.append(Fault("POST", COMMIT, "lose"))
    assert push(out, REPO, "--yes", "--create-pr").url == f"{hub.url}/{REPO}/discussions/1"
    assert len(hub.store.repos[REPO].pull_requests) == 1


def test_a_push_of_somebody_else_meanwhile_is_not_undone(hub, push, out):
    """Whether it comes before the commit or between two attempts at it."""
    push(out, REPO, *YES)
    (out / "NOTICE").write_text("notice")

    def meanwhile(request):
        if "/preupload/" in request.path and not done:
            done.append(1)
            hub.store.edit(REPO, "README.md", b"another text")
        return answer(request)

    answer, done = hub.answer, []
    hub.answering = meanwhile
    try:
        failed = push(out, REPO, "--yes", status=1)
        assert "somebody else has pushed" in failed.err
        assert hub.store.text(REPO, "README.md") == "another text"
        assert "NOTICE" not in hub.store.repos[REPO].main.files
        done.clear()
        hub.server.faults.append(Fault("POST", COMMIT, 500))
        failed = push(out, REPO, *YES, status=1)
        assert "somebody else has pushed" in failed.err
    finally:
        hub.answering = None
    push(out, REPO, *YES)
    assert "NOTICE" in hub.store.repos[REPO].main.files
    assert hub.store.text(REPO, "README.md").rstrip().startswith("---")
    assert "another text" in hub.store.text(REPO, "README.md")
