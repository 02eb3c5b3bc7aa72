"""The kernels compile for every supported part, within its shared memory, the fast ones without spills."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layer_launches import OPTIONS

SCRIPT = Path(__file__).with_name("compile_kernels.py")


def compile_kernels(*options: str) -> list[dict]:
    """Run the script in a process in which Triton compiles instead of interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    variants = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode in (0, 1), done.stderr[-3000:]
    assert variants, done.stderr[-3000:]
    return variants


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches go to the GPU that is there")
@pytest.mark.parametrize("cover", ["first", "pairs"])
def test_kernels_compile_and_fit(cover):
    wrong = {
        json.dumps({k: v for k, v in x.items() if k != "kernels"})
        for x in compile_kernels("--cover", cover)
        if x["wrong"]
    }
    assert not wrong


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches go to the GPU that is there")
@pytest.mark.parametrize("cover", ["first", "pairs"])
def test_kernels_of_the_layer_compile_without_spills(cover):
    compiled = compile_kernels("--ops", "layer", "--cover", cover)
    assert {x["op"] for x in compiled} == set(OPTIONS)
    assert all(x["kernels"] for x in compiled)
    assert not [x for x in compiled if x["wrong"]]


def test_pairs_cover_every_pair():
    rows = [[json.dumps(x[name]) for name in list(x)[:-2]] for x in compile_kernels("--cover", "pairs", "--list")]
    columns = [set(column) for column in zip(*rows, strict=True)]
    for (a, xs), (b, ys) in itertools.combinations(enumerate(columns), 2):
        for x, y in itertools.product(xs, ys):
            assert any(row[a] == x and row[b] == y for row in rows) or {x, y} == {'"dense"', '"packed"'}, (x, y)
    assert [len(column) for column in columns] == [5, 7, 3, 4, 2, 3, 2, 2, 3]
