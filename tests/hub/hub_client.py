"""What the tests here do with the Hub: publish by the command, and load in processes that have only its repo."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hub_server import Hub
from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

HERE = Path(__file__).parent
WRITES, READS = "hf_alice_writes", "hf_alice_reads"


def write_stock(folder: Path, **sizes: int) -> Path:
    """A stock T5 v1.1 with ByT5's tokenizer, which needs no file of words."""
    shape = {"vocab_size": 384, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4} | sizes
    config = T5Config(**shape, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    # transformers 5 ties a fresh T5 even when asked not to; a head of its own has to be put there.
    model.lm_head.weight = torch.nn.Parameter(torch.randn(shape["vocab_size"], shape["d_model"]))
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


@dataclass
class Done:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def url(self) -> str:
        return self.out.splitlines()[-1]


def client_environment(hub: Hub, home: Path, **changes: str) -> dict[str, str]:
    """Environment of a process that talks to this Hub, and has no token but what lies in `home`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "5"}
    quiet = {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1,localhost", "TOKENIZERS_PARALLELISM": "false"}
    return kept | {"PYTHONPATH": paths} | settings | quiet | changes


class ForkServer:
    """A process that has imported everything and forks for each request; see fork_server.py."""

    def __init__(self, script: str, hub: Hub, home: Path, **environment: str) -> None:
        self.home = home
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / script)],
            env=client_environment(hub, home, **environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, token: str | None, **request: Any) -> Done:
        """Have it done, with nothing in the cache but this token."""
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir()
        if token:
            (self.home / "token").write_text(token)
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Done(**json.loads(self.process.stdout.readline()))

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class Pusher(ForkServer):
    """`push(OUT, REPO_ID, ...)`: the command, as alice, who may write, if no token is named."""

    def __call__(
        self,
        *arguments: object,
        status: int = 0,
        token: str | None = WRITES,
        load: bool = False,
        typed: str | None = None,
        **environment: str,
    ) -> Done:
        command = ["push", *map(str, arguments)]
        terminal = {"typed": typed} if typed is not None else {}
        done = self.ask(token, arguments=command, environment=environment, load=load, **terminal)
        assert done.status == status, done.out + done.err
        assert "Traceback" not in done.err
        return done


class User(ForkServer):
    """`user("action", ...)`: what user_server.py does, where there is no FAT5."""

    def __call__(self, action: str, token: str | None = WRITES, **arguments: object) -> None:
        done = self.ask(token, action=action, arguments=arguments)
        assert done.status == 0, done.out + done.err
