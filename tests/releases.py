"""Other releases of transformers, and the tests under them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RELEASES = {"4.57": "transformers==4.57.*", "5.17": "transformers==5.17.*", "current": None}


def install(requirement: str, folder: Path) -> None:
    """Put a release of transformers and what it depends on into a folder, to come before all else."""
    # with `datasets`, which Trainer imports where it finds it and which must fit the same huggingface_hub
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), requirement, "datasets"]
    subprocess.run(pip, check=True)


def run(release: str, paths: dict[str, str], *arguments: object, cwd: Path) -> None:
    """Run Python under a release; `paths` as the fixture `releases` gives them."""
    path = os.pathsep.join(filter(None, [paths[release], str(ROOT)]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HOME": str(cwd / f"hf_{release}")}
    result = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"under transformers {release}:\n{result.stdout[-8000:]}{result.stderr[-4000:]}"


def run_tests(release: str, paths: dict[str, str], marked: str, *tests: Path, cwd: Path) -> None:
    """Run tests of this project, those with the markers that `marked` says, under a release."""
    code = f"import transformers as t; assert t.__version__.startswith({release!r})"
    run(release, paths, "-c", code, cwd=cwd)
    options = ["-q", "-m", marked, "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml"]
    run(release, paths, "-m", "pytest", *options, *tests, cwd=cwd)
