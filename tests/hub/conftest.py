"""A Hub on this machine, a folder to publish, and the command that does it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_client import READS, WRITES, Pusher, User, write_stock
from hub_server import Hub
from hub_store import Store

from fat5convert.convert import convert


@pytest.fixture(scope="session")
def published_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted and verified folder in three shards; not to be changed."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("publish")
    convert(str(write_stock(root / "tiny-t5")), root / "tiny-fat5", shard_size=100_000)
    assert len(list((root / "tiny-fat5").glob("*.safetensors"))) == 3
    return root / "tiny-fat5"


@pytest.fixture
def out(published_once: Path, tmp_path: Path) -> Path:
    """A copy of it to be published, spoilt or added to."""
    return Path(shutil.copytree(published_once, tmp_path / "tiny-fat5"))


@pytest.fixture(scope="session")
def session_hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.stop()


@pytest.fixture
def hub(session_hub: Hub) -> Hub:
    """The Hub, with nothing on it."""
    fresh = Store(tokens={WRITES: ("alice", "write"), READS: ("alice", "read"), "hf_bob_writes": ("bob", "write")})
    session_hub.store = fresh
    for server in (session_hub.server, session_hub.storage):
        server.requests.clear()
        server.faults.clear()
    return session_hub


@pytest.fixture(scope="session")
def session_pusher(session_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pusher]:
    pusher = Pusher("push_server.py", session_hub, tmp_path_factory.mktemp("home") / "hf")
    yield pusher
    pusher.stop()


@pytest.fixture
def push(hub: Hub, session_pusher: Pusher) -> Pusher:
    return session_pusher


@pytest.fixture(scope="session")
def session_user(session_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    user = User("user_server.py", session_hub, tmp_path_factory.mktemp("user") / "hf")
    yield user
    user.stop()


@pytest.fixture
def user(hub: Hub, session_user: User) -> User:
    return session_user
