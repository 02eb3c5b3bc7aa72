"""A Hub on this machine with one data set, and what a user sees of it: `dataset_hub.py FOLDER` prints JSON.

In a process of its own: the client reads where the Hub is when it is imported, and the tests run without network.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import threading
import warnings
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

NAME = "alice/words"
FILE = "train.jsonl"


class Hub(BaseHTTPRequestHandler):
    """As much of huggingface.co as `datasets` asks for; the last commit is `main`."""

    commits: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        match = re.fullmatch(rf"/api/datasets/{NAME}(?:/revision/(\w+))?", path)
        tree = re.fullmatch(rf"/api/datasets/{NAME}/tree/(\w+)(/.+)?", path)
        file = re.fullmatch(rf"/datasets/{NAME}/resolve/(\w+)/(.+)", path)
        revision = next((m[1] for m in (match, tree, file) if m), None)
        sha = list(self.commits)[-1] if revision in (None, "main") else revision
        if not (match or tree or file) or sha not in self.commits or (file and file[2] != FILE) or (tree and tree[2]):
            code = "EntryNotFound" if file or tree else "RepoNotFound"
            self.answer(404, b"", {"X-Error-Code": code, "X-Repo-Commit": sha})
        elif match:
            self.answer(200, {"id": NAME, "sha": sha, "siblings": [{"rfilename": FILE}], "private": False, "tags": []})
        elif tree:
            data = self.commits[sha]
            self.answer(200, [{"type": "file", "path": FILE, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}])
        else:
            data = self.commits[sha]
            self.answer(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": sha})

    do_HEAD = do_GET  # noqa: N815 (the name is the server's)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        sha = self.path.rsplit("/", 1)[-1]
        data = self.commits.get(sha, b"")
        asked = "paths-info" in self.path
        entry = {"type": "file", "path": FILE, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        self.answer(200, [entry] if asked else {})

    def answer(self, status: int, body: object, headers: dict | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


def commit(text: str) -> str:
    """Put a new version of the data set on the Hub."""
    sha = hashlib.sha1(f"{len(Hub.commits)}{text}".encode()).hexdigest()
    Hub.commits[sha] = "".join(json.dumps({"text": f"{text} {n}"}) + "\n" for n in range(3)).encode()
    return sha


def go_offline() -> None:
    """As HF_HUB_OFFLINE=1 does, without minutes of retrying."""
    import datasets
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def main(folder: Path, tokenizer_folder: str) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(folder / "hf")}
    os.environ |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    from transformers import AutoTokenizer

    from fat5.data import CorpusOptions, DataError, DataOptions, MixtureOptions, open_mixture, tokenize_corpus
    from fat5.data.setup import streamed_batches

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    corpus = CorpusOptions(dataset=NAME)
    options = DataOptions(train=(CorpusOptions(dataset=NAME, streaming=True),), max_input_length=64)
    mixture = open_mixture(options, MixtureOptions("t5_span_corruption"), tokenizer, None)

    def tokenised(**changes: object) -> dict[str, object]:
        """The first document, where it is kept, and what was warned of."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                store = tokenize_corpus(replace(corpus, **changes), tokenizer, mixture.ids, folder / "cache")
            except DataError as error:
                return {"refused": str(error)}
        tokens, ends = store.shards()[0]
        told = [str(w.message) for w in caught if NAME in str(w.message)]
        return {"text": tokenizer.decode(tokens[: ends[0]].tolist()), "store": store.folder.name, "warned": told}

    def stream():
        return streamed_batches(options, mixture, tokenizer, batch_size=2, batches_per_step=1, seed=0)

    def windows(batches, count: int) -> tuple[list[str], dict]:
        taken = list(islice(batches.gathered(), count))
        texts = [tokenizer.decode(window.tolist()) for gathered, _ in taken for window in gathered.tokens]
        return texts, json.loads(json.dumps(taken[-1][1]))

    found: dict[str, object] = {}
    first = commit("first")
    found["first"] = tokenised()
    running = stream()
    _, state = windows(running, 1)
    commit("second")
    found["second"], found["main"] = tokenised(), tokenised(revision="main")
    found["streamed"] = tokenised(streaming=True)
    found["first by its commit"] = tokenised(revision=first)
    resumed = stream()
    found["a new stream"] = windows(resumed, 1)[0][:1]
    resumed.load_state(state)
    found["resumed"], found["would be"] = windows(resumed, 4)[0], windows(running, 5)[0][2:]
    go_offline()
    found["offline"] = tokenised()
    found["offline, another commit"] = tokenised(revision="0" * 40)
    found["offline, first by its commit"] = tokenised(revision=first)
    shutil.rmtree(folder / "hf")
    found["offline, nothing downloaded"] = tokenised()
    found["offline, never read"] = tokenised(config="other")
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
