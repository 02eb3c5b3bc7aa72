"""OUT is complete or absent whatever happens: kill -9, signals, a full disk, a vanished source, two runs at once."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_checkpoints import write_checkpoint

from fat5convert.convert import Plan, convert
from fat5convert.errors import ConvertError
from fat5convert.hashing import hash_file
from fat5convert.verify import verify

# Children are forked from a process that has imported everything and runs no threads.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["fat5convert.convert"])
SHARD = 100_000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crashes") / "source"
    return write_checkpoint(folder, "mt5", sharded=True, vocab_size=2000, d_model=64, d_ff=128)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in folder.iterdir()}


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def run(source: Path, out: Path, overwrite: bool = False, on_progress: Callable[[], None] | None = None) -> None:
    def progress(plan: Plan) -> Callable[[int], None]:
        return lambda count: on_progress() if on_progress else None

    convert(str(source), out, shard_size=SHARD, verify=False, overwrite=overwrite, progress=progress)


def run_and_tell(begun: Any, *arguments: Any) -> None:
    begun.set()
    run(*arguments)


def kill_at_random(source: Path, out: Path, times: int, seed: int, overwrite: bool) -> int:
    """Kill conversions at random moments of their run; returns how many of them it caught in the middle."""
    original, chance, caught = contents(source), random.Random(seed), 0
    for again in (False, True):  # the first one is slower
        start = time.monotonic()
        run(source, out, overwrite=again)
        duration = time.monotonic() - start
    for _ in range(times):
        if out.exists() and not overwrite:
            shutil.rmtree(out)
        begun = PROCESSES.Event()  # how long a process takes to start says nothing
        process = PROCESSES.Process(target=run_and_tell, args=(begun, source, out, overwrite))
        process.start()
        assert begun.wait(60)
        time.sleep(chance.uniform(0, 1.5 * duration))
        process.kill()
        process.join()
        caught += bool(leftovers(out.parent))
        assert set(leftovers(out.parent)) <= {f".{out.name}.fat5-partial", f".{out.name}.fat5-replaced"}
        if out.exists():
            assert verify(out)["result"] == "same", "an OUT that is there is whole"
        elif overwrite:
            assert leftovers(out.parent), "the old one is set aside, not lost"
        assert contents(source) == original
    run(source, out, overwrite=out.exists() or overwrite)
    assert verify(out, str(source))["result"] == "same"
    assert leftovers(out.parent) == []
    return caught


@pytest.mark.parametrize("overwrite", [False, True])
def test_kill_9_at_random_moments(overwrite: bool, source: Path, tmp_path: Path) -> None:
    kill_at_random(source, tmp_path / "out", times=3, seed=0, overwrite=overwrite)


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_kill_9_at_thirty_random_moments(overwrite: bool, source: Path, tmp_path: Path) -> None:
    assert kill_at_random(source, tmp_path / "out", times=30, seed=1, overwrite=overwrite) >= 5


class DieAfter:
    """Ends the process without a word at the n-th chunk written."""

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks

    def __call__(self) -> None:
        self.chunks -= 1
        if self.chunks == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def die(source: Path, out: Path, chunks: int) -> Path:
    """Kill a conversion in the middle; returns what it left."""
    process = PROCESSES.Process(target=run, args=(source, out, False, DieAfter(chunks)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    return out.parent / f".{out.name}.fat5-partial"


def test_resuming_keeps_the_finished_shards(source: Path, tmp_path: Path) -> None:
    partial = die(source, tmp_path / "out", 40)
    finished = {path.name: path.stat().st_ino for path in partial.glob("*.safetensors")}
    assert len(finished) > 3
    unfinished = sorted(finished)[-1]
    spoilt = sorted(finished)[0]
    data = bytearray((partial / spoilt).read_bytes())
    data[-1] ^= 1
    (partial / spoilt).write_bytes(data)
    os.link(partial / spoilt, tmp_path / "keep-inode")
    written: list[str] = []
    run(source, tmp_path / "out", on_progress=lambda: written.append("chunk"))
    now = {path.name: path.stat() for path in (tmp_path / "out").glob("*.safetensors")}
    assert verify(tmp_path / "out", str(source))["result"] == "same"
    for name, inode in finished.items():
        if name not in (spoilt, unfinished):
            assert now[name].st_ino == inode, f"{name} was finished and whole, and need not be written again"
    assert len(written) < 70, "the rest alone was written"
    assert not (tmp_path / "out" / "unfinished.json").exists()


@pytest.mark.parametrize("change", ["source", "options"])
def test_what_another_run_left_is_not_used(change: str, source: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(source, tmp_path / "source"))
    partial = die(mine, tmp_path / "out", 40)
    before = {path.stat().st_ino for path in partial.glob("*.safetensors")}
    assert before
    if change == "source":
        for shard in mine.glob("*.safetensors"):
            shard.touch()
        run(mine, tmp_path / "out")
    else:
        convert(str(mine), tmp_path / "out", dtype="bfloat16", verify=False)
        assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
    assert verify(tmp_path / "out", str(mine))["result"] == "same"
    assert leftovers(tmp_path) == []


def hold(source: Path, out: Path, started: Any, go_on: Any) -> None:
    def wait() -> None:
        started.set()
        go_on.wait(60)

    run(source, out, on_progress=wait)


def test_two_conversions_into_one_out(source: Path, tmp_path: Path) -> None:
    started, go_on = PROCESSES.Event(), PROCESSES.Event()
    first = PROCESSES.Process(target=hold, args=(source, tmp_path / "out", started, go_on))
    first.start()
    assert started.wait(60)
    with pytest.raises(ConvertError, match="another conversion into it is running"):
        run(source, tmp_path / "out")
    go_on.set()
    first.join()
    assert first.exitcode == 0
    assert verify(tmp_path / "out", str(source))["result"] == "same"
    assert leftovers(tmp_path) == []


def test_a_source_that_vanishes(source: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(source, tmp_path / "source"))
    with pytest.raises(ConvertError, match=r"model-.*safetensors"):
        run(mine, tmp_path / "out", on_progress=lambda: [path.unlink() for path in mine.glob("*.safetensors")])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up(source: Path, small_disk: Path) -> None:
    def fill() -> None:
        with open(small_disk / "filler", "ab") as file:
            file.truncate(0)
            file.write(b"0" * (shutil.disk_usage(small_disk).free - 8192))

    with pytest.raises(ConvertError, match="no space left"):
        run(source, small_disk / "out", on_progress=fill)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    (small_disk / "filler").unlink()
    run(source, small_disk / "out")
    assert verify(small_disk / "out")["result"] == "same"


def too_large(source: Path, out: Path) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    with pytest.raises(ConvertError, match="File too large"):
        run(source, out)


def test_a_limit_on_file_size(source: Path, tmp_path: Path) -> None:
    process = PROCESSES.Process(target=too_large, args=(source, tmp_path / "out"))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert list(tmp_path.iterdir()) == []


def maps_of(process: int) -> str:
    """What a process has loaded."""
    return Path(f"/proc/{process}/maps").read_text()


@pytest.mark.parametrize(
    ("number", "when"),
    [
        (signal.SIGTERM, "importing"),
        (signal.SIGINT, "importing"),
        (signal.SIGTERM, "writing"),
        pytest.param(signal.SIGINT, "writing", marks=pytest.mark.slow),
    ],
)
def test_signals_end_it_cleanly(number: signal.Signals, when: str, source: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, "-m", "fat5convert", str(source), str(out), "--shard-size", "2KB"]
    with open(log, "w") as stderr:
        process = subprocess.Popen(command, stdout=stderr, stderr=stderr)
        partial = tmp_path / ".out.fat5-partial"
        while when == "importing" and process.poll() is None and "libtorch" not in maps_of(process.pid):
            time.sleep(0.001)
        while when == "writing" and process.poll() is None and not list(partial.glob("*.safetensors")):
            time.sleep(0.005)
        process.send_signal(number)
        assert process.wait(60) == 128 + number, log.read_text()
    assert "Traceback" not in log.read_text()
    assert ("interrupted" in log.read_text()) == (when == "writing"), "what unwinds inside an import may be lost there"
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
