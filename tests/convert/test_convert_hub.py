"""Hub ids, through the real huggingface_hub client: a server on this machine, its cache, and no network at all."""

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from toy_checkpoints import pieces, write_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/tiny-t5"


class Hub:
    """As much of the Hub's interface as downloading a snapshot takes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.downloads = folder, set[str]()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = unquote(urlparse(request.path).path)
        files = sorted(self.folder.iterdir())
        if path in (f"/api/models/{REPO}", *(f"/api/models/{REPO}/revision/{r}" for r in ("main", "v1", COMMIT))):
            info = {"id": REPO, "sha": COMMIT, "private": False, "siblings": [{"rfilename": f.name} for f in files]}
            self.send(request, json.dumps(info | {"tags": [], "downloads": 0, "likes": 0}).encode(), body)
        elif path.startswith(f"/api/models/{REPO}/tree/"):
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": self.oid(f)} for f in files]
            self.send(request, json.dumps(tree).encode(), body)
        elif path.startswith(f"/{REPO}/resolve/") and (self.folder / path.rsplit("/", 1)[1]).exists():
            file = self.folder / path.rsplit("/", 1)[1]
            if body:
                self.downloads.add(file.name)
            self.send(request, file.read_bytes(), body, ETag=f'"{self.oid(file)}"')
        else:
            revision = path.startswith(f"/api/models/{REPO}/")
            self.send(request, b"{}", body, 404, **{"X-Error-Code": "RevisionNotFound" if revision else "RepoNotFound"})

    def send(self, request: BaseHTTPRequestHandler, data: bytes, body: bool, status: int = 200, **headers: str) -> None:
        request.send_response(status)
        for name, value in ({"X-Repo-Commit": COMMIT, "Content-Length": str(len(data))} | headers).items():
            request.send_header(name, value)
        request.end_headers()
        if body:
            request.wfile.write(data)

    @staticmethod
    def oid(file: Path) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Hub]:
    folder = write_checkpoint(tmp_path / "repo", "umt5", weights=getattr(request, "param", "safetensors"), sharded=True)
    (folder / "spiece.model").write_bytes(pieces())
    (folder / "tf_model.h5").write_bytes(b"large")
    hub = Hub(folder)
    yield hub
    hub.server.shutdown()


@pytest.fixture
def online(env: dict[str, str]) -> dict[str, str]:
    return env | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "2"}


def fat5convert(env: dict[str, str], *args: object, code: int = 0) -> Any:
    command = [sys.executable, "-m", "fat5convert", *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.parametrize("hub", ["safetensors", pytest.param("bin", marks=pytest.mark.slow)], indirect=True)
def test_hub_id_then_its_cache(hub: Hub, online: dict[str, str], tmp_path: Path) -> None:
    env = online | {"HF_ENDPOINT": hub.endpoint}
    fat5convert(env, REPO, tmp_path / "out", "--revision", "v1", "--no-verify")
    conversion = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert (conversion["source"]["name"], conversion["source"]["revision"]) == (REPO, COMMIT)
    assert (tmp_path / "out" / "spiece.model").read_bytes() == (hub.folder / "spiece.model").read_bytes()
    assert "tf_model.h5" not in hub.downloads
    assert conversion["source"]["files"] == sorted(f for f in hub.downloads if "-of-" in f)

    hub.server.shutdown()
    offline = env | {"HF_HUB_OFFLINE": "1"}
    fat5convert(offline, "verify", tmp_path / "out", "--against", REPO, "--revision", COMMIT)


def test_no_network_and_no_cache(online: dict[str, str], tmp_path: Path) -> None:
    for env in (online | {"HF_ENDPOINT": "http://127.0.0.1:9"}, online | {"HF_HUB_OFFLINE": "1"}):
        done = fat5convert(env, REPO, tmp_path / "out", code=1)
        assert done.stderr.startswith(
            f"Error: {REPO}: no folder here, not in the local cache, and the Hub cannot be reached"
        )
        assert not (tmp_path / "out").exists()


def test_what_the_hub_does_not_have(hub: Hub, online: dict[str, str], tmp_path: Path) -> None:
    env = online | {"HF_ENDPOINT": hub.endpoint}
    assert "neither a folder here nor a model" in fat5convert(env, "someone/else", tmp_path / "out", code=1).stderr
    wrong = fat5convert(env, REPO, tmp_path / "out", "--revision", "v9", code=1)
    assert "no such revision" in wrong.stderr
    assert not (tmp_path / "out").exists()
