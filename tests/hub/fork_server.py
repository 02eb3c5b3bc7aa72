"""Processes of their own for the tests, without paying for the imports each time.

Started with HF_ENDPOINT and HF_HOME in its environment, which huggingface_hub reads when it is imported. Reads lines of
JSON, forks a process for each, and answers with its exit status and output.
"""

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch


def serve(run: Callable[[dict], None]) -> None:
    """Answer requests by `run(request)`, and end at once: taking torch down takes seconds."""
    torch.set_num_threads(1)
    print("ready", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [str(Path(folder, name)) for name in ("out", "err")]
        for line in sys.stdin:
            request = json.loads(line)
            if (process := os.fork()) == 0:
                _be(run, request, outputs)
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            out, err = (Path(path).read_text() for path in outputs)
            print(json.dumps({"status": status, "out": out, "err": err}), flush=True)
    os._exit(0)


def _be(run: Callable[[dict], None], request: dict, outputs: list[str]) -> None:
    """Do it in the forked process, and leave without the parent's own ending."""
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.dup2(_keyboard(request["typed"]) if "typed" in request else os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0)  # noqa: SIM115 (the parent's has been read ahead of)
    os.environ.update(request.get("environment", {}))
    status = 0
    try:
        run(request)
    except SystemExit as exit:
        status = exit.code
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def _keyboard(typed: str) -> int:
    """A terminal at which this has been typed."""
    ours, theirs = os.openpty()
    os.write(ours, typed.encode())
    return theirs
