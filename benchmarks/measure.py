"""What the benchmarks share: times without launch overhead, and a description of where they were taken."""

import datetime
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

ON_GPU = torch.cuda.is_available()


def milliseconds(function: Callable[[], object], rep: int, graph: bool = True) -> float:
    """Median time of one call over `rep` ms: on a GPU captured in a graph and replayed, or launched without `graph`."""
    if not ON_GPU:
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3
    from triton.testing import do_bench

    if not graph:
        return do_bench(function, warmup=rep // 4, rep=rep, return_mode="median")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        function()
    time_ms = do_bench(captured.replay, warmup=rep // 4, rep=rep, return_mode="median")
    del captured
    return time_ms


def describe() -> dict:
    """Where and with what this was measured."""
    import triton

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "device": torch.cuda.get_device_name()
        if ON_GPU
        else f"cpu ({platform.machine()}), interpreted: times mean nothing",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if ON_GPU else None,
        "triton": triton.__version__,
        "commit": commit.stdout.strip() if commit.returncode == 0 else None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def peak_memory(function: Callable[[], object]) -> int | None:
    """Most bytes that a call holds beyond what there is before it, its results included."""
    if not ON_GPU:
        return None
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before
