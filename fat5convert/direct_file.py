"""Writing a large file once, in several places at a time, without leaving it in the page cache."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

SIZE = 8 * 2**20  # bytes sent at once
ALIGNMENT = max(4096, mmap.PAGESIZE)  # of what is sent: a multiple of every disk's sectors
O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it


class DirectFile:
    """A new file, written past the page cache where system and file system can do that.

    Nobody reads a converted checkpoint at once, unless it is verified; in the cache it would take the place of what is
    read, and finding memory for it can take longer than writing it to a disk that is quick.

    Args:
        path: of the file.
        cached: leave it in the page cache all the same, for whoever reads it next.
    """

    def __init__(self, path: Path, cached: bool) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._direct: FileIO | None = None
        self._refused = False
        # What fills no whole page is written when all else is on the disk: in the cache, a page that another thread
        # writes to past it would be of yesterday.
        self._pieces: list[tuple[int, bytes]] = []
        self._spare: list[memoryview] = []  # buffers that no region uses
        if O_DIRECT and not cached:
            with suppress(OSError):  # a file system that cannot
                self._direct = open(path, "r+b", buffering=0, opener=_open_direct)  # noqa: SIM115

    @contextmanager
    def region(self, start: int) -> Iterator[Region]:
        """Write from an offset on, in a thread; the last bytes are sent when the block ends without an error."""
        # Each begins with a page, as direct writing wants.
        buffer = self._spare.pop() if self._spare else memoryview(mmap.mmap(-1, SIZE))
        region = Region(self, start, buffer)
        yield region
        region.send()
        self._spare.append(buffer)

    def put(self, offset: int, data: memoryview) -> None:
        """Write bytes at an offset, or keep what fills no page until the end."""
        if self._direct is None or self._refused:
            _write(self._file, offset, data)
            return
        first = min(-offset % ALIGNMENT, len(data))
        last = max(first, (offset + len(data)) // ALIGNMENT * ALIGNMENT - offset)
        self._pieces += [(offset, bytes(data[:first])), (offset + last, bytes(data[last:]))]
        try:
            _write(self._direct, offset + first, data[first:last])
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            self._refused = True  # this file system, or a disk of larger sectors, says only now that it cannot
            _write(self._file, offset + first, data[first:last])

    def finish(self) -> None:
        """Write what is left, and wait until all is on the disk."""
        for offset, data in self._pieces:
            _write(self._file, offset, memoryview(data))
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, finished or not."""
        try:
            self._file.close()
        finally:
            if self._direct is not None:
                self._direct.close()


def _open_direct(path: str, flags: int) -> int:
    return os.open(path, flags | O_DIRECT)


def _write(file: FileIO, offset: int, data: memoryview) -> None:
    while len(data):
        done = os.pwrite(file.fileno(), data, offset)
        offset, data = offset + done, data[done:]


class Region:
    """Where one thread writes in a `DirectFile`: it gathers bytes in a buffer and sends them when that is full."""

    def __init__(self, file: DirectFile, start: int, buffer: memoryview) -> None:
        self._file, self._buffer = file, buffer
        self._begun = self._filled = start % ALIGNMENT
        self._base = start - self._begun  # offset of the buffer in the file

    def write(self, data: memoryview) -> None:
        """Take the next bytes."""
        while len(data):
            count = min(len(data), SIZE - self._filled)
            self._buffer[self._filled : self._filled + count] = data[:count]
            self._filled += count
            data = data[count:]
            if self._filled == SIZE:
                self.send()

    def send(self) -> None:
        """Put what has been gathered into the file."""
        self._file.put(self._base + self._begun, self._buffer[self._begun : self._filled])
        self._base += self._filled
        self._begun = self._filled = 0
