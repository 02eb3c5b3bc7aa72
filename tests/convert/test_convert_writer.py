"""OUT is complete or absent: what is written, and what is left behind when writing fails."""

import faulthandler
import json
import queue
import random
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import torch
from safetensors import safe_open
from toy_checkpoints import all_tensors

from fat5convert import convert as convert_module
from fat5convert.convert import convert
from fat5convert.direct_file import Region
from fat5convert.errors import ConvertError
from fat5convert.formats import CHUNK, SafetensorsFile, TensorInfo, chunks_of
from fat5convert.precision import Form
from fat5convert.staging import check_space, holds_model, staged
from fat5convert.workers import MOST, Task, one_thread_each, share_out
from fat5convert.writer import Item, write_weights


class InMemory:
    """Tensors as a source, in pieces of seven values."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        return iter(self.tensors[name].reshape(-1).split(7))


def items(tensors: dict[str, torch.Tensor]) -> list[Item]:
    source = InMemory(tensors)
    return [Item(name, source, name, TensorInfo(t.dtype, tuple(t.shape)), Form(t.dtype)) for name, t in tensors.items()]


TENSORS = {
    "odd": torch.randn(3, 5).bfloat16(),
    "wide": torch.randn(7, 2),
    "sliced": torch.randn(6, 8).T,
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5),
    "half": torch.randn(5).half(),
    "single": torch.randn(10)[::5][:1],
}


@pytest.mark.parametrize("shard_size", [1, 100, 10**9])
def test_written_files_are_read_by_the_safetensors_library(shard_size: int, tmp_path: Path) -> None:
    counts: list[int] = []
    write_weights(tmp_path, items(TENSORS), shard_size, counts.append)
    back = all_tensors(tmp_path)
    assert back.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    assert sum(counts) == sum(t.nbytes for t in TENSORS.values())
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        ours = SafetensorsFile(path)
        assert all(torch.equal(ours.load(name), TENSORS[name]) for name in ours.tensors)
    index = tmp_path / "model.safetensors.index.json"
    if shard_size == 10**9:
        assert not index.exists()
        return
    stored = json.loads(index.read_text())
    assert stored["metadata"]["total_size"] == sum(counts)
    assert stored["weight_map"].keys() == TENSORS.keys()
    for name, shard in stored["weight_map"].items():
        assert name in SafetensorsFile(tmp_path / shard).tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_chunks_at_a_time(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the disk: each thread reads a chunk when it has written the one before."""
    alive: set[tuple[str, int]] = set()
    most = 0

    class Source:
        def chunks(self, name: str) -> Iterator[torch.Tensor]:
            nonlocal most
            for i in range(100):
                memory = np.zeros(5, dtype=np.float32)
                weakref.finalize(memory, alive.discard, (name, i))
                alive.add((name, i))
                most = max(most, len(alive))
                yield torch.from_numpy(memory)
                del memory

    write = Region.write

    def slowly(self: Region, data: memoryview) -> None:
        time.sleep(1e-3)
        write(self, data)

    monkeypatch.setattr(Region, "write", slowly)
    todo = [Item(f"t{i}", Source(), f"s{i}", TensorInfo(torch.float32, (500,)), Form(dtype)) for i in range(9)]
    counts: list[int] = []
    write_weights(tmp_path, todo, 10**9, counts.append)
    assert len(counts) == 900
    threads = min(torch.get_num_threads() + 1, MOST)
    assert threads <= most <= 2 * threads  # one that is written, and the next


def interrupted(moment: float, folder: Path) -> bool:
    """Whether a signal at that moment, whose handler raises as the command's does, came before the end."""

    class Source:
        def chunks(self, name: str) -> Iterator[torch.Tensor]:
            return iter(torch.ones(4096 * 40).split(4096))

    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        raise SystemExit(1)

    before = signal.signal(signal.SIGALRM, leave)
    item = Item("t", Source(), "t", TensorInfo(torch.float32, (4096 * 40,)), Form(torch.bfloat16))
    try:
        signal.setitimer(signal.ITIMER_REAL, moment)
        write_weights(folder, [item], 10**9, lambda count: None, cached=False)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except SystemExit:
        return True
    finally:
        signal.signal(signal.SIGALRM, before)
    return False


@pytest.mark.parametrize("times", [50, pytest.param(1500, marks=pytest.mark.slow)])
def test_a_signal_at_any_moment_ends_the_writing(times: int, tmp_path: Path) -> None:
    """With locks written in Python, one in a few hundred left a thread, and whoever waited for it, waiting for good."""
    chance = random.Random(times)
    faulthandler.dump_traceback_later(300, exit=True)
    try:
        start = time.perf_counter()
        assert not interrupted(60, tmp_path)
        whole = time.perf_counter() - start  # which a first time is longer
        stopped = sum(interrupted(chance.uniform(1e-4, whole), tmp_path) for _ in range(times))
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert stopped > 0  # how many, is the machine's affair


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_tasks_are_shared_out(threads: int) -> None:
    at_work, at_once, counts = set[int](), set[int](), list[int]()

    def task(i: int) -> Task:
        for step in range(5):
            at_work.add(i)
            time.sleep(1e-3)
            at_once.add(len(at_work))
            if step == 4:
                at_work.remove(i)
            yield 100 * i + step

    share_out((task(i) for i in range(20)), threads, counts.append)
    assert sorted(counts) == [100 * i + step for i in range(20) for step in range(5)]
    assert max(at_once) == threads
    share_out([], threads, counts.append)
    assert len(counts) == 100


@pytest.mark.parametrize("culprit", ["task", "advance", "nobody"])
def test_all_tasks_end_when_one_fails(culprit: str) -> None:
    """With the step that each is at, before the error is raised; what has not begun does not begin."""
    steps, closed, told = list[int](), list[int](), list[int]()

    def task(i: int) -> Task:
        try:
            for step in range(10):
                if culprit == "task" and (i, step) == (2, 5):
                    raise ConvertError("the task")
                steps.append(i)
                time.sleep(1e-3)
                yield 1
        finally:
            closed.append(i)

    def advance(count: int) -> None:
        told.append(count)
        if culprit == "advance" and len(told) == 12:
            raise ConvertError("the advance")

    expected = nullcontext() if culprit == "nobody" else pytest.raises(ConvertError, match=f"the {culprit}")
    with expected:
        share_out([task(i) for i in range(40)], 3, advance)
    before = len(steps)
    assert sorted(closed)[:3] == [0, 1, 2]
    assert (len(closed) == 40) == (before == 400) == (culprit == "nobody")
    time.sleep(0.02)
    assert len(steps) == before, "no thread is left at work"


def test_a_task_that_finds_a_queue_empty_has_failed() -> None:
    def task() -> Task:
        yield 1
        raise queue.Empty

    with pytest.raises(queue.Empty):
        share_out([task()], 2, lambda count: None)


def test_a_second_signal_does_not_leave_a_thread_at_work() -> None:
    at_work, done = threading.Event(), list[int]()

    def slow() -> Task:
        at_work.set()
        time.sleep(0.3)
        done.append(1)
        yield 1

    def leave(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, leave)

    def interrupt_twice() -> None:
        at_work.wait()
        for _ in range(2):
            time.sleep(0.05)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)

    threading.Thread(target=interrupt_twice).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            share_out([slow()], 1, lambda count: None)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert done, "the step that had begun was waited for"


def test_torch_has_its_threads_again() -> None:
    threads = torch.get_num_threads()
    with one_thread_each() as workers:
        assert workers == min(threads + 1, MOST)
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == threads


STRIDED = {
    "transposed": torch.arange(3000 * 300).reshape(3000, 300).T,
    "one row is too long": torch.arange(3 * 2 * (CHUNK + 5)).reshape(2 * (CHUNK + 5), 3).T,
    "every other": torch.arange(4 * CHUNK + 7)[::2],
    "turned": torch.arange(2 * 3 * CHUNK).reshape(64, CHUNK // 32, 3).permute(2, 0, 1),
    "expanded": torch.arange(CHUNK)[:, None].expand(CHUNK, 3),
    "small": torch.arange(12).reshape(3, 4).T,
    "empty": torch.zeros(0, 4).T,
    "scalar": torch.tensor(3),
}


@pytest.mark.parametrize("name", STRIDED)
def test_strided_values_of_a_pickle_come_in_the_same_chunks(name: str, tmp_path: Path) -> None:
    """And without a copy of all of them: several such tensors are read at a time."""
    tensor = STRIDED[name]
    found = list(chunks_of(tensor))
    assert [x.shape for x in found] == [x.shape for x in tensor.reshape(-1).split(CHUNK)]
    assert torch.equal(torch.cat(found), tensor.reshape(-1))
    if not tensor.is_contiguous():
        assert all(x.untyped_storage().nbytes() <= CHUNK * tensor.itemsize for x in found)


@pytest.mark.parametrize("change", [torch.zeros(6), torch.zeros(8), torch.zeros(7).half(), torch.zeros(15)])
def test_a_source_that_changes_meanwhile(change: torch.Tensor, tmp_path: Path) -> None:
    """In its only piece, or before the last."""
    item = Item("t", InMemory({"t": change}), "t", TensorInfo(torch.float32, (7,)), Form(torch.float32))
    with pytest.raises(ConvertError, match="tensor t changed"):
        write_weights(tmp_path, [item], 1000, lambda count: None)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ConvertError, OSError, MemoryError])
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_left_behind(error: type[BaseException], overwrite: bool, flan: Path, tmp_path: Path) -> None:
    """Interrupted in the middle of the weights: no OUT, or the old OUT as it was."""
    out = tmp_path / "deep" / "er" / "out"
    if overwrite:
        convert(str(flan), out, verify=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    calls = iter(range(10))

    def interrupt(count: int) -> None:
        if next(calls) == 5:
            raise error("stop")

    expected = ConvertError if error is OSError else error
    with pytest.raises(expected):
        convert(str(flan), out, overwrite=overwrite, verify=False, progress=lambda plan: interrupt)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert out.exists() == (tmp_path / "deep").exists() == overwrite


def test_overwrite_replaces_the_whole_folder(flan: Path, originals: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(str(flan), out, shard_size=20_000, verify=False)
    assert len(list(out.glob("model-*"))) > 2
    convert(str(originals["mt5"]), out, overwrite=True, verify=False)
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flan", "out"]


def test_the_old_folder_survives_a_failed_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text('{"model_type": "flash_t5"}')
    rename = Path.rename

    def refuse_the_new(self: Path, target: Path) -> Path:
        if self.name.endswith("-partial"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new)
    with pytest.raises(ConvertError, match="no space"), staged(out, True, holds_model("flash_t5")):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "config.json"]


def test_a_copy_that_finds_no_room_is_told_by_the_name_of_the_output(tmp_path: Path) -> None:
    full = OSError(28, "No space left on device", "source/spiece.model")
    with (
        pytest.raises(ConvertError, match=r"^\S+/out: no space left on the disk$"),
        staged(tmp_path / "out", False, holds_model("flash_t5")),
    ):
        raise full
    assert not list(tmp_path.iterdir())


def test_an_out_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def somebody_else() -> Iterator[None]:
        with staged(out, False, holds_model("flash_t5")) as folder:
            (folder / "config.json").write_text("{}")
            out.mkdir()
            (out / "theirs").write_text("kept")
            yield

    with pytest.raises(ConvertError, match="appeared"):
        list(somebody_else())
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_too_small_a_disk(tmp_path: Path, flan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConvertError, match="GB free"):
        check_space(tmp_path / "not" / "yet" / "there", 10**18)
    monkeypatch.setattr(convert_module, "check_space", lambda out, needed: check_space(out, needed + 10**18))
    with pytest.raises(ConvertError, match="GB free"):
        convert(str(flan), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc")
def test_what_is_no_disk_is_not_said_to_be_full(flan: Path) -> None:
    with pytest.raises(ConvertError, match="/proc/out: cannot be written"):
        convert(str(flan), Path("/proc/out"))
