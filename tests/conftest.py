"""Settings every test runs under: few threads (tests run in parallel), and no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from releases import RELEASES, install

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_seed_for_every_test():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def releases(tmp_path_factory) -> dict[str, str]:
    """`PYTHONPATH` for each release of transformers; empty for the one that is installed."""
    paths = {}
    for name, requirement in RELEASES.items():
        folder = tmp_path_factory.mktemp(f"transformers_{name}")
        if requirement is not None:
            install(requirement, folder)
        paths[name] = str(folder) if requirement else ""
    return paths


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)
