"""What the tests here do with the Hub: publish by the command, and load in processes that have only its repo."""

import json
import os
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


class Pusher:
    """Gives `fat5convert push` to a process that has imported everything."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.home = home
        environment = client_environment(hub, home)
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "push_server.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n"

    def __call__(
        self, *arguments: object, status: int = 0, token: str | None = WRITES, load: bool = False, **environment: str
    ) -> Done:
        home_token = self.home / "token"
        home_token.parent.mkdir(exist_ok=True)
        home_token.write_text(token) if token else home_token.unlink(missing_ok=True)
        request = {"arguments": ["push", *map(str, arguments)], "environment": environment, "load": load}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        done = Done(**json.loads(self.process.stdout.readline()))
        assert done.status == status, done.out + done.err
        assert "Traceback" not in done.err
        return done


def client_environment(hub: Hub, home: Path, **changes: str) -> dict[str, str]:
    """Environment of a process that talks to this Hub, and has no token but what lies in `home`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "5"}
    quiet = {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "TOKENIZERS_PARALLELISM": "false"}
    return kept | {"PYTHONPATH": paths} | settings | quiet | changes


def fresh(hub: Hub, home: Path, script: Path, *arguments: Any, **changes: str) -> str:
    """Run a script in a process of its own that sees no `fat5` and has an empty cache."""
    environment = client_environment(hub, home, PYTHONPATH="", **changes)
    command = [sys.executable, "-P", str(script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=home.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
