"""Runs `fat5convert` as processes of their own, without paying for the imports each time.

Started with HF_ENDPOINT and HF_HOME in its environment, which huggingface_hub reads when it is imported. Reads lines of
JSON, {"arguments": [...], "environment": {...}, "load": bool}, forks a process for each that does what the command
does, and answers with its exit status and output. Without `load`, a folder is taken to load: other tests see to that.
"""

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

import torch

import fat5convert.publish.preflight as preflight
import fat5convert.publish.push
from fat5convert.cli import main


def child(request: dict, outputs: list[str]) -> None:
    """Be the command."""
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0)  # noqa: SIM115 (the parent's has been read ahead of)
    os.environ.update(request["environment"])
    if not request["load"]:
        preflight.check_loading = lambda *args, **kwargs: None
    status = 1
    try:
        main(request["arguments"], prog_name="fat5convert")
    except SystemExit as exit:
        status = exit.code
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)  # without the parent's own ending


def serve() -> None:
    torch.set_num_threads(1)
    print("ready", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [str(Path(folder, name)) for name in ("out", "err")]
        for line in sys.stdin:
            request = json.loads(line)
            if (process := os.fork()) == 0:
                child(request, outputs)
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            out, err = (Path(path).read_text() for path in outputs)
            print(json.dumps({"status": status, "out": out, "err": err}), flush=True)


if __name__ == "__main__":
    assert fat5convert.publish.push
    serve()
    os._exit(0)  # at once: taking torch down takes seconds
