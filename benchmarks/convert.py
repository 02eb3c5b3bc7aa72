"""Peak memory of conversion and verification, and the speed of conversion against `cp` with fsync.

    python benchmarks/convert.py make FOLDER large           # a checkpoint of T5's shape and random weights
    python benchmarks/convert.py make FOLDER large --bin     # the same as sharded `.bin`
    python benchmarks/convert.py memory FOLDER [--verify] [--dtype bfloat16]
    python benchmarks/convert.py speed FOLDER [--turns 3]

Each measurement is added to benchmarks/results/convert.json. Memory is that of a process of its own, looked at every
10 ms: anonymous pages (RssAnon) apart from file-backed ones (RssFile), over those of an interpreter that has imported
torch. Speed: the source is read once before every turn, so that it is in the page cache as far as it fits; the
conversion is timed from the call of `convert` (imports apart) to the published folder, hashing and fsync included;
`cp --reflink=never` of the weight files is timed until they are fsynced. They take turns.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from fat5convert.formats import TensorInfo, open_weights
from fat5convert.keymap import expand
from fat5convert.known_configs import KNOWN_CONFIGS
from fat5convert.layout import Layout
from fat5convert.precision import Form
from fat5convert.writer import Item, write_weights

RESULTS = Path(__file__).parent / "results" / "convert.json"
CONVERT = """
import sys, time
from fat5convert.convert import convert
start = time.monotonic()
convert(sys.argv[1], sys.argv[2], dtype=sys.argv[3], verify=sys.argv[4] == "verify")
print(time.monotonic() - start)
"""


class Random:
    """Random weights as a source; every tensor of a shape repeats the same million values."""

    def __init__(self, infos: dict[str, TensorInfo]) -> None:
        self.infos, self.values = infos, torch.randn(1 << 20) * 0.05

    def chunks(self, name: str) -> Any:
        left = self.infos[name].numel
        while left:
            yield self.values[: min(left, len(self.values))]
            left -= min(left, len(self.values))


def make(folder: Path, size: str, as_bin: bool) -> None:
    """Write a stock T5 v1.1 of a published size in fp32."""
    raw = KNOWN_CONFIGS[f"t5-v1_1-{size}"]
    layout = Layout(
        **{name: raw[name] for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")},
        num_decoder_layers=raw["num_layers"],
        num_buckets=32,
        gated=True,
        per_layer_bias=False,
        tied=False,
    )
    infos = {pair.t5: TensorInfo(torch.float32, pair.shape) for pair in expand(layout, 10**6)}
    source = Random(infos)
    folder.mkdir(parents=True)
    items = [Item(name, source, name, info, Form(torch.float32)) for name, info in infos.items()]
    write_weights(folder, items, 3_000_000_000, lambda count: None)
    (folder / "config.json").write_text(json.dumps(raw))
    if as_bin:
        _to_bin(folder)


def _to_bin(folder: Path) -> None:
    weight_map = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = open_weights(path)
        target = folder / path.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save({name: file.load(name) for name in file.tensors}, target)
        weight_map |= dict.fromkeys(file.tensors, target.name)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    if len(set(weight_map.values())) > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def weights(folder: Path) -> list[Path]:
    """The weight files of a checkpoint."""
    return [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin")]


def resident(pid: int) -> dict[str, int]:
    """RssAnon, RssFile and VmRSS in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "VmRSS")}


def peak(command: list[str]) -> tuple[dict[str, int], str]:
    """Highest memory of a process, each kind by itself, and what it printed."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    highest: dict[str, int] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            try:
                now = resident(process.pid)
            except (OSError, KeyError):
                return
            for name, value in now.items():
                highest[name] = max(highest.get(name, 0), value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    printed, _ = process.communicate()
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return highest, printed


def measure_memory(folder: Path, dtype: str, verify: bool) -> dict[str, Any]:
    """Peak memory of one conversion, against the bound of 600 MB and three times the largest tensor."""
    base, _ = peak([sys.executable, "-c", "import torch, time; time.sleep(0.5)"])
    largest = max(info.nbytes for path in weights(folder) for info in open_weights(path).tensors.values())
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        highest, seconds = peak(
            [sys.executable, "-c", CONVERT, str(folder), f"{out}/out", dtype, "verify" if verify else "no"]
        )
    anonymous = highest["RssAnon"] - base["RssAnon"]
    bound = 600_000_000 + 3 * largest
    return {
        "what": "memory",
        **describe(folder),
        "dtype": dtype,
        "verify": verify,
        "seconds": round(float(seconds), 1),
        "largest_tensor_mb": round(largest / 1e6, 1),
        "bound_mb": round(bound / 1e6, 1),
        "over_torch_anonymous_mb": round(anonymous / 1e6, 1),
        "over_torch_file_backed_mb": round((highest["RssFile"] - base["RssFile"]) / 1e6, 1),
        "over_torch_total_mb": round((highest["VmRSS"] - base["VmRSS"]) / 1e6, 1),
        "torch_alone_mb": {name: round(value / 1e6, 1) for name, value in base.items()},
        "within_bound": anonymous <= bound,
    }


def measure_speed(folder: Path, turns: int) -> dict[str, Any]:
    """Seconds of `cp` with fsync, of `keep` and of `bfloat16`, in turns."""
    seconds: dict[str, list[float]] = {"cp": [], "keep": [], "bfloat16": []}
    for _ in range(turns):
        for name, times in seconds.items():
            for path in weights(folder):  # into the page cache
                with open(path, "rb", buffering=0) as file:
                    while file.read(1 << 24):
                        pass
            with tempfile.TemporaryDirectory(dir=folder.parent) as out:
                os.sync()
                times.append(copy(folder, Path(out)) if name == "cp" else run_convert(folder, out, name))
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "what": "speed",
        **describe(folder),
        "turns": turns,
        "seconds": {name: [round(t, 2) for t in times] for name, times in seconds.items()},
        "of_cp": {name: round(median["cp"] / median[name], 2) for name in ("keep", "bfloat16")},
    }


def copy(folder: Path, out: Path) -> float:
    """Seconds of `cp` and fsync."""
    start = time.monotonic()
    subprocess.run(["cp", "--reflink=never", *map(str, weights(folder)), str(out)], check=True)
    for path in out.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return time.monotonic() - start


def run_convert(folder: Path, out: str, dtype: str) -> float:
    """Seconds of one conversion, imports apart."""
    command = [sys.executable, "-c", CONVERT, str(folder), f"{out}/out", dtype, "no"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def describe(folder: Path) -> dict[str, Any]:
    """What was converted, and where."""
    files = weights(folder)
    return {
        "checkpoint_gb": round(sum(path.stat().st_size for path in files) / 1e9, 2),
        "format": files[0].suffix,
        "files": len(files),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["make", "memory", "speed"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("size", nargs="?", default="large")
    parser.add_argument("--bin", action="store_true")
    parser.add_argument("--dtype", default="keep")
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    if options.command == "make":
        make(options.folder, options.size, options.bin)
        return
    if options.command == "memory":
        result = measure_memory(options.folder, options.dtype, options.verify)
    else:
        result = measure_speed(options.folder, options.turns)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.write_text(json.dumps([*results, result], indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
