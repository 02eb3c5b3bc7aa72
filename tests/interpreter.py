"""Where there is no GPU: tests of Triton kernels in a process of their own, in which Triton interprets them.

Triton reads TRITON_INTERPRET when kernels are defined, and the other tests must not run in its interpreter. There only
attention is interpreted, unless a test asks for more (`serve_layers`).
"""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_KERNELS = INTERPRETED or torch.cuda.is_available()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="runs in the process that interprets Triton")


def run_interpreted(file: str, marker: str = "not slow") -> None:
    """Run the tests of a file that need kernels, in the interpreter, unless that is where this is running."""
    if HAS_KERNELS:
        pytest.skip("the kernels are at hand")
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    settings = Path(__file__).parents[1] / "pyproject.toml"
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", marker, "-c", settings]
    command = [sys.executable, "-m", "pytest", *options, file]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


LAYER_KERNELS = (
    "fused_linear",
    "lm_head_flash_t5",
    "ops_cache",
    "ops_cross_entropy",
    "ops_decode_attention",
    "ops_few_rows_linear",
    "ops_gated_act",
    "ops_gated_linear",
    "ops_linear_cross_entropy",
    "ops_rms_norm",
)
"""Modules of `fat5.model` that ask whether kernels serve a device, those of attention aside."""


def serve_layers(serve: bool) -> None:
    """Have norm, activation and loss run as kernels in the interpreter, which takes a second for a few rows, or not."""
    kernels_serve = import_module("fat5.model.ops_attention").kernels_serve
    for name in LAYER_KERNELS:
        import_module(f"fat5.model.{name}").kernels_serve = kernels_serve if serve else lambda device: False


if INTERPRETED:
    from triton_interpreter import mend

    mend()
    serve_layers(False)
