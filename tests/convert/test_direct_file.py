"""Files written past the page cache: the same bytes, whatever the disk makes of it."""

import errno
import fcntl
import os
import random
import threading

import pytest

from fat5convert import direct_file
from fat5convert.direct_file import ALIGNMENT, O_DIRECT, SIZE, DirectFile

LENGTHS = [0, 1, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE + ALIGNMENT + 5]


def write(path, data, starts=(0,), cached=False, seed=0):
    """In regions, each by a thread and in pieces of random sizes."""
    file = DirectFile(path, cached)
    failures = []

    def fill(start, end):
        chance, rest = random.Random(seed + start), memoryview(data)[start:end]
        try:
            with file.region(start) as region:
                while len(rest):
                    count = min(len(rest), chance.choice([1, 700, ALIGNMENT, 100_000, SIZE, 3 * SIZE]))
                    region.write(rest[:count])
                    rest = rest[count:]
        except OSError as error:
            failures.append(error)

    try:
        threads = [
            threading.Thread(target=fill, args=span) for span in zip(starts, [*starts[1:], len(data)], strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        file.finish()
    finally:
        file.close()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_byte_arrives(tmp_path, length, cached):
    data = random.Random(length).randbytes(length)
    write(tmp_path / "file", data, cached=cached)
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_regions_meet_anywhere(tmp_path, seed, cached):
    """Within a page, many in one page, empty, larger than a buffer, and begun in any order."""
    chance = random.Random(seed)
    steps = [chance.choice([0, 1, 5, 700, ALIGNMENT, 3 * ALIGNMENT - 1, 100_000, SIZE + 77]) for _ in range(12)]
    starts = [sum(steps[:i]) for i in range(len(steps))]
    data = chance.randbytes(sum(steps))
    write(tmp_path / "file", data, starts, cached, seed)
    assert (tmp_path / "file").read_bytes() == data


def test_a_longer_file_of_that_name_is_replaced(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 3 * SIZE)
    write(tmp_path / "file", b"y" * 10)
    assert (tmp_path / "file").read_bytes() == b"y" * 10


def test_buffers_are_used_again(tmp_path):
    file = DirectFile(tmp_path / "file", cached=False)
    for i in range(10):
        with file.region(i) as region:
            region.write(memoryview(b"x"))
    assert len(file._spare) == 1
    file.close()


def is_direct(file):
    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & O_DIRECT)


def put_on(monkeypatch, trouble):
    """Have a disk write with difficulties."""
    written = os.pwrite

    def troubled(file, data, offset):
        return trouble(written, file, data, offset)

    monkeypatch.setattr(direct_file.os, "pwrite", troubled)


@pytest.mark.skipif(not O_DIRECT, reason="this system has no direct writing")
@pytest.mark.parametrize("cached", [False, True])
def test_only_whole_pages_go_past_the_cache(tmp_path, monkeypatch, cached):
    sent = []

    def watch(do, file, data, offset):
        sent.append((is_direct(file), offset, len(data)))
        return do(file, data, offset)

    put_on(monkeypatch, watch)
    write(tmp_path / "file", b"x" * (SIZE + ALIGNMENT + 5), cached=cached)
    if cached:
        assert sent == [(False, 0, SIZE), (False, SIZE, ALIGNMENT + 5)]
    else:
        assert sent == [(True, 0, SIZE), (True, SIZE, ALIGNMENT), (False, SIZE + ALIGNMENT, 5)]


@pytest.mark.skipif(not O_DIRECT, reason="this system has no direct writing")
def test_pages_that_regions_share_are_written_when_all_else_is(tmp_path, monkeypatch):
    sent = []

    def watch(do, file, data, offset):
        sent.append((is_direct(file), len(data)))
        return do(file, data, offset)

    put_on(monkeypatch, watch)
    data = random.Random(5).randbytes(4 * ALIGNMENT)
    write(tmp_path / "file", data, [0, ALIGNMENT + 100, 2 * ALIGNMENT - 100])
    assert (tmp_path / "file").read_bytes() == data
    kinds = [direct for direct, _ in sent]
    assert kinds == sorted(kinds, reverse=True)
    assert sum(count for direct, count in sent if direct) == 3 * ALIGNMENT


def test_a_file_system_that_refuses_when_it_is_written_to(tmp_path, monkeypatch):
    def refuse(do, file, data, offset):
        if is_direct(file):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return do(file, data, offset)

    put_on(monkeypatch, refuse)
    data = random.Random(1).randbytes(2 * SIZE + 77)
    write(tmp_path / "file", data, [0, SIZE - 5])
    assert (tmp_path / "file").read_bytes() == data


def test_two_that_are_refused_at_the_same_time(tmp_path, monkeypatch):
    both = threading.Barrier(2, timeout=10)

    def refuse(do, file, data, offset):
        if is_direct(file):
            both.wait()
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return do(file, data, offset)

    put_on(monkeypatch, refuse)
    data = random.Random(4).randbytes(2 * SIZE)
    write(tmp_path / "file", data, [0, SIZE])
    assert (tmp_path / "file").read_bytes() == data


def test_one_that_is_refused_after_a_part(tmp_path, monkeypatch):
    def refuse(do, file, data, offset):
        if is_direct(file) and offset % (2 * ALIGNMENT):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return do(file, data[:ALIGNMENT] if is_direct(file) else data, offset)

    put_on(monkeypatch, refuse)
    data = random.Random(6).randbytes(SIZE + 3 * ALIGNMENT)
    write(tmp_path / "file", data, [0, 2 * ALIGNMENT])
    assert (tmp_path / "file").read_bytes() == data


def test_what_comes_after_closing_goes_nowhere(tmp_path):
    """A thread that is still at it must not write into whatever was opened next."""
    file = DirectFile(tmp_path / "file", cached=False)
    file.close()
    with open(tmp_path / "other", "wb") as other:
        with pytest.raises(ValueError, match="closed file"), file.region(0) as region:
            region.write(memoryview(bytes(SIZE)))
        assert other.tell() == 0
    assert (tmp_path / "other").stat().st_size == 0


def test_a_file_system_that_refuses_at_once(tmp_path, monkeypatch):
    def refuse(path, flags, *args, do=os.open):
        if flags & O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return do(path, flags, *args)

    monkeypatch.setattr(direct_file.os, "open", refuse)
    data = random.Random(2).randbytes(SIZE + 77)
    write(tmp_path / "file", data, [0, 77])
    assert (tmp_path / "file").read_bytes() == data


def test_a_disk_that_takes_little_at_a_time(tmp_path, monkeypatch):
    put_on(monkeypatch, lambda do, file, data, offset: do(file, data if len(data) == SIZE else data[:1000], offset))
    data = random.Random(3).randbytes(2 * SIZE + 7777)
    write(tmp_path / "file", data, [0, 3000])
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize("cached", [False, True])
def test_a_full_disk_is_told(tmp_path, monkeypatch, cached):
    def full(do, file, data, offset):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    put_on(monkeypatch, full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file", b"x" * SIZE, cached=cached)
