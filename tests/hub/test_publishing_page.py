"""docs/publishing.md: its commands publish, and its code works where FAT5 is not installed."""

import re
import shlex
from pathlib import Path

from hub_client import WRITES

PAGE = Path(__file__).parents[2] / "docs" / "publishing.md"
FOLDER, REPO, TUNED = "flan-t5-small-fat5", "my-name/flan-t5-small-fat5", "my-name/flan-t5-small-tuned"


def test_blocks_run(hub, push, user, out):
    hub.store.tokens[WRITES] = ("my-name", "write")
    (kind, commands), (next_kind, code) = re.findall(
        r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )
    assert (kind, next_kind) == ("console", "python")
    dry_run, publish = filter(None, (shlex.split(line, comments=True) for line in commands.splitlines()))
    for program, command, folder, *_ in (dry_run, publish):
        assert (program, command, folder) == ("fat5convert", "push", FOLDER)
    push(out, *dry_run[3:])
    assert not hub.store.repos
    done = push(out, *publish[3:], typed="y\n")
    assert done.url.endswith(f" {hub.url}/{REPO}"), "behind the question, whose answer is not echoed here"
    assert not hub.store.repos[REPO].private
    user("run_code", code=code)
    files = [hub.store.repos[repo].main.files for repo in (REPO, TUNED)]
    assert {name for name in files[0] if name.endswith(".py")} <= files[1].keys()
    user("check", repo=TUNED)
