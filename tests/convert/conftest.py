"""Checkpoints and conversions that many tests read."""

import os
import shutil
from pathlib import Path

import pytest
import transformers
from toy_checkpoints import FAMILIES, write_checkpoint

from fat5convert.convert import convert

transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint per family, one-file safetensors, v4 dialect; not to be changed (copy it)."""
    root = tmp_path_factory.mktemp("originals")
    return {family: write_checkpoint(root / family, family) for family in FAMILIES}


@pytest.fixture
def flan(originals: dict[str, Path], tmp_path: Path) -> Path:
    """A T5 v1.1 checkpoint that the test may spoil."""
    return Path(shutil.copytree(originals["t5-v1.1"], tmp_path / "flan"))


@pytest.fixture(scope="session")
def converted(originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The conversion of each of the originals; not to be changed."""
    root = tmp_path_factory.mktemp("converted")
    for family, folder in originals.items():
        convert(str(folder), root / family, verify=False)
    return {family: root / family for family in FAMILIES}


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """Environment of a fresh process, with caches of its own."""
    return os.environ | {"HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
