"""Files written past the page cache: the same bytes, whatever the disk makes of it."""

import errno
import fcntl
import os
import random

import pytest

from fat5convert import direct_file
from fat5convert.direct_file import ALIGNMENT, O_DIRECT, SIZE, DirectFile

LENGTHS = [0, 1, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE + ALIGNMENT + 5]


def write(path, data, cached=False, seed=0):
    """In pieces of random sizes."""
    chance, rest = random.Random(seed), memoryview(data)
    file = DirectFile(path, cached)
    try:
        while len(rest):
            count = min(len(rest), chance.choice([1, 700, ALIGNMENT, 100_000, SIZE, 3 * SIZE]))
            file.write(rest[:count])
            rest = rest[count:]
        file.finish()
    finally:
        file.close()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_byte_arrives(tmp_path, length, cached):
    data = random.Random(length).randbytes(length)
    write(tmp_path / "file", data, cached)
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.skipif(not O_DIRECT, reason="this system has no direct writing")
@pytest.mark.parametrize("cached", [False, True])
def test_only_whole_pages_go_past_the_cache(tmp_path, monkeypatch, cached):
    file = DirectFile(tmp_path / "file", cached)
    sent = []

    class Watched:
        def __init__(self, raw):
            self.raw = raw

        def __getattr__(self, name):
            return getattr(self.raw, name)

        def write(self, data):
            sent.append((bool(fcntl.fcntl(self.raw, fcntl.F_GETFL) & O_DIRECT), len(data)))
            return self.raw.write(data)

    monkeypatch.setattr(file, "_file", Watched(file._file))
    file.write(b"x" * (SIZE + ALIGNMENT + 5))
    file.finish()
    file.close()
    direct = not cached
    assert sent == [(direct, SIZE), (direct, ALIGNMENT), (False, 5)]


class Disk:
    """A raw file that is written to with difficulties."""

    def __init__(self, raw, trouble):
        self.raw, self.trouble = raw, trouble

    def __getattr__(self, name):
        return getattr(self.raw, name)

    def write(self, data):
        return self.trouble(self.raw, data)


def put_on(monkeypatch, trouble):
    def troubled(*args, **options):
        return Disk(open(*args, **options), trouble)

    monkeypatch.setattr(direct_file, "open", troubled, raising=False)


def is_direct(raw):
    return bool(fcntl.fcntl(raw, fcntl.F_GETFL) & O_DIRECT)


def test_a_file_system_that_refuses_when_it_is_written_to(tmp_path, monkeypatch):
    def refuse(raw, data):
        if is_direct(raw):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return raw.write(data)

    put_on(monkeypatch, refuse)
    data = random.Random(1).randbytes(2 * SIZE + 77)
    write(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == data


def test_a_file_system_that_refuses_at_once(tmp_path, monkeypatch):
    def refuse(file, command, *args, do=fcntl.fcntl):
        if command == fcntl.F_SETFL and args[0] & O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return do(file, command, *args)

    monkeypatch.setattr(direct_file.fcntl, "fcntl", refuse)
    data = random.Random(2).randbytes(SIZE + 77)
    write(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == data


def test_a_disk_that_takes_little_at_a_time(tmp_path, monkeypatch):
    put_on(monkeypatch, lambda raw, data: raw.write(data if is_direct(raw) and len(data) == SIZE else data[:1000]))
    data = random.Random(3).randbytes(2 * SIZE + 7777)
    write(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == data


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(raw, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    put_on(monkeypatch, full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file", b"x" * SIZE)
