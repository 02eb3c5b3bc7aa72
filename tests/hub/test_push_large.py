"""The whole way as it is gone: large files in parts, processes that have imported nothing, and one that is killed."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from hub_client import WRITES, client_environment, write_stock
from hub_http import Fault
from transformers import AutoModelForSeq2SeqLM

from fat5convert.convert import convert

pytestmark = pytest.mark.slow

REPO = "alice/large-fat5"
GENERATE = """
import sys
sys.modules["fat5"] = sys.modules["fat5convert"] = None  # what a machine without the package has
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = tokenizer("How old are you?", return_tensors="pt").input_ids
print(model.generate(ids, max_new_tokens=6, do_sample=False).tolist())
"""


def test_over_20_mb_in_parts_killed_and_given_again(hub, tmp_path):
    stock = write_stock(tmp_path / "large-t5", vocab_size=12_000, d_model=256)
    out = tmp_path / "large-fat5"
    convert(str(stock), out, verify=True)
    assert (out / "model.safetensors").stat().st_size > 20_000_000
    environment = client_environment(hub, tmp_path / "hf", HF_TOKEN=WRITES)
    command = [sys.executable, "-m", "fat5convert", "push", str(out), REPO, "--yes", "--license", "apache-2.0"]

    def killing(request):
        if "/commit/" in request.path:
            os.kill(process.pid, signal.SIGKILL)
        return hub.answer(request)

    dropped = Fault("PUT", r"/\w+/2", "drop")
    hub.storage.faults.append(dropped)
    hub.answering = killing
    try:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        told = process.communicate()[1]
    finally:
        hub.answering = None
    assert process.returncode == -signal.SIGKILL
    assert dropped.times == 0
    assert re.search(r"model\.safetensors: .*MB/s\]", told), "progress"
    parts = [request.path for request in hub.storage.requests if request.method == "PUT" and request.body]
    assert len(parts) == len(set(parts)) > 2

    hub.storage.requests.clear()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{hub.url}/{REPO}"
    assert not [request for request in hub.storage.requests if request.method == "PUT"], "nothing is uploaded twice"
    assert hub.store.repos[REPO].titles() == ["Publish with fat5convert", "initial commit"], "the commit was taken"

    tokens = torch.tensor([[*(byte + 3 for byte in b"How old are you?"), 1]])
    model = AutoModelForSeq2SeqLM.from_pretrained(stock)
    expected = model.generate(tokens, max_new_tokens=6, do_sample=False).tolist()
    alone = client_environment(hub, tmp_path / "other", PYTHONPATH="", HF_TOKEN=WRITES)
    command = [sys.executable, "-c", GENERATE, REPO]
    done = subprocess.run(command, env=alone, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(expected)
