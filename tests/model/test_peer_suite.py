"""The peer's tests: those that transformers runs on every model of its own, run on ours.

They come with the source distribution of the installed release, which is fetched when the test runs. Those of
`generate` are not in there: `peer_skips.py` says what else is not, and what is skipped, with reasons.
"""

import os
import re
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path

import pytest
from peer_skips import BY_THE_SUITE, LISTED, NOT_DISTRIBUTED

HERE = Path(__file__).parent

pytestmark = pytest.mark.versions


def pip(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--quiet", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    """A folder with the suite as its package `tests`, and what that needs beside transformers."""
    folder = tmp_path_factory.mktemp("peer")
    release = f"transformers=={version('transformers')}"
    for done in (
        pip("download", "--no-deps", "--no-binary", "transformers", "--dest", folder, release),
        pip("install", "--target", folder, "parameterized"),
    ):
        if done.returncode != 0:
            pytest.skip(f"{release} or its tests' requirements cannot be had: {done.stderr[-500:]}")
    (archive,) = folder.glob("transformers-*.tar.gz")
    with tarfile.open(archive) as distribution:
        for member in distribution.getmembers():
            inside = member.name.partition("/")[2]
            if member.isfile() and inside.startswith("tests/"):
                member.name = inside
                distribution.extract(member, folder, filter="data")
    (folder / "tests" / "__init__.py").touch()
    for name, text in NOT_DISTRIBUTED.items():
        file = folder / "tests" / name
        assert not file.exists(), f"{release} has {name}: use it"
        file.parent.mkdir(exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(text)
    return folder


def test_the_peer_s_own_tests_pass(suite, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(suite), str(HERE.parents[1])])}
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "-c", HERE.parents[1] / "pyproject.toml"]
    command = [sys.executable, "-m", "pytest", *options, f"--junitxml={tmp_path / 'result.xml'}"]
    done = subprocess.run(
        [*map(str, command), str(HERE / "peer_models.py")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed, skipped = set(), {}
    for case in ElementTree.parse(tmp_path / "result.xml").iter("testcase"):
        for skip in case.findall("skipped"):
            skipped.setdefault(skip.get("message"), set()).add(case.get("name"))
        if case.find("skipped") is None:
            passed.add((case.get("classname"), case.get("name")))
    listed = {f"listed: {reason}": {name.rpartition(".")[2]} for name, reason in LISTED.items()}
    assert {reason: skipped.pop(reason, None) for reason in listed} == listed
    unknown = {
        words: names for words, names in skipped.items() if not any(re.fullmatch(p, words) for p in BY_THE_SUITE)
    }
    assert not unknown
    assert len(passed) > 150
