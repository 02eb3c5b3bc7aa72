"""The other way for large files: Xet, whose client takes a folder on this machine in the place of its servers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_client import WRITES, client_environment

pytest.importorskip("hf_xet")
pytestmark = pytest.mark.slow

REPO = "alice/tiny-fat5"
DOWNLOAD = "import sys, huggingface_hub; print(huggingface_hub.snapshot_download(sys.argv[1]))"
HASHES = "import sys, json, hf_xet; print(json.dumps([info.hash for info in hf_xet.hash_files(sys.argv[1:])]))"


def test_weights_go_and_come_back(hub, out, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "chunks", tmp_path / "chunks")
    hub.chunks.mkdir()
    environment = client_environment(hub, tmp_path / "hf", HF_HUB_DISABLE_XET="0", HF_TOKEN=WRITES)

    def run(*command: object) -> str:
        command = [sys.executable, *map(str, command)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert WRITES not in done.stdout + done.stderr
        return done.stdout.splitlines()[-1]

    assert run("-m", "fat5convert", "push", out, REPO, "--yes", "--license", "mit") == f"{hub.url}/{REPO}"
    assert any("/xet-write-token/" in request.path for request in hub.server.requests)
    weights = sorted(out.glob("*.safetensors"))
    files = hub.store.repos[REPO].main.files
    hashes = json.loads(run("-c", HASHES, *weights))
    hub.xet_hashes.update({files[path.name].sha256: xet for path, xet in zip(weights, hashes, strict=True)})

    folder = Path(run("-c", DOWNLOAD, REPO))
    for path in weights:
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert any("/xet-read-token/" in request.path for request in hub.server.requests)
    assert not hub.storage.requests, "nothing went by LFS"
    kept = [path for folder in (hub.chunks, tmp_path / "hf") for path in folder.rglob("*") if path.is_file()]
    assert all(WRITES.encode() not in path.read_bytes() for path in kept), "nor in the client's logs"
