"""Publishing, and what becomes of a repo, under other releases of transformers and huggingface_hub."""

from pathlib import Path

import pytest
from releases import RELEASES, run_tests

HERE = Path(__file__).parent

pytestmark = pytest.mark.versions


@pytest.mark.parametrize("release", [name for name in RELEASES if RELEASES[name]])
def test_pushing_passes(release, releases, tmp_path):
    run_tests(release, releases, "not slow and not versions", HERE, cwd=tmp_path)


@pytest.mark.parametrize("release", [name for name in RELEASES if RELEASES[name]])
def test_every_way_of_saving_passes(release, releases, tmp_path):
    run_tests(release, releases, "slow and not versions", HERE / "test_life_after_push.py", cwd=tmp_path)
