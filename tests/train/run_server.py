"""Runs of `fat5 pretrain` as processes of their own, without paying for the imports each time.

Reads lines of JSON, {"arguments": [...], "most_bytes": null}, forks a process for each that does what the command
does, and answers with its id and, when it has ended, with its exit status and output.
"""

import json
import os
import resource
import sys
from pathlib import Path

import torch

import fat5.train.run
from fat5.cli import main


def child(request: dict) -> None:
    """Be the command, with a group of its own. `most_bytes` bounds a file's size, as a full disk would."""
    os.setpgid(0, 0)
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if request["most_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["most_bytes"], resource.RLIM_INFINITY))
    main(request["arguments"])


def serve() -> None:
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if (process := os.fork()) == 0:
            child(request)
            raise AssertionError("a click command exits")
        print(process, flush=True)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        print(json.dumps({"status": status, "output": Path(request["output"]).read_text()}), flush=True)


if __name__ == "__main__":
    assert fat5.train.run
    serve()
