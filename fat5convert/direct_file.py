"""Writing a large file once, from front to end, without leaving it in the page cache."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path

from fat5convert.lanes import Lanes

SIZE = 8 * 2**20  # bytes sent at once
ALIGNMENT = 4096  # of what is sent: a multiple of every disk's sectors
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
        # One is filled while the other is sent; each begins with a page.
        self._buffer, self._other = (memoryview(mmap.mmap(-1, SIZE)) for _ in range(2))
        self._filled = 0
        self._disk = Lanes(("disk",))
        self._direct = False
        if not cached:
            self._set_direct(True)

    def write(self, data: bytes | memoryview) -> None:
        """Take the next bytes."""
        data = memoryview(data)
        while len(data):
            count = min(len(data), SIZE - self._filled)
            self._buffer[self._filled : self._filled + count] = data[:count]
            self._filled += count
            data = data[count:]
            if self._filled == SIZE:
                self._disk.finish()
                self._disk.give("disk", self._send, self._buffer, 0, SIZE)
                self._buffer, self._other = self._other, self._buffer
                self._filled = 0

    def finish(self) -> None:
        """Write what is left, and wait until all is on the disk."""
        self._disk.finish()
        whole = self._filled // ALIGNMENT * ALIGNMENT
        self._send(self._buffer, 0, whole)
        self._set_direct(False)
        self._send(self._buffer, whole, self._filled)
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, finished or not."""
        self._disk.close()
        self._file.close()

    def _send(self, buffer: memoryview, start: int, end: int) -> None:
        while start < end:
            try:
                start += self._file.write(buffer[start:end])
            except OSError as error:
                if not self._direct or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self._set_direct(False)  # this file system says only now that it cannot
            if start % ALIGNMENT:
                self._set_direct(False)  # the disk is full, as the next call will say

    def _set_direct(self, direct: bool) -> None:
        if direct == self._direct or not O_DIRECT:
            return
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL) & ~O_DIRECT
        try:
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags | O_DIRECT if direct else flags)
        except OSError:
            if not direct:
                raise
            return  # a file system that cannot
        self._direct = direct
