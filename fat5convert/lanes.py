"""Threads that work side by side on what passes, each in order."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch

DEPTH = 16  # calls that may wait in one lane: enough to bridge the writing of what `DirectFile` sends at once

Call = tuple[Callable[..., None], tuple[Any, ...]]


class _Lane:
    """One thread and the calls that wait for it.

    Only `SimpleQueue` is waited at: it is written in C. A signal whose handler raises between two lines of Python, as
    in the locks of `threading` and `concurrent.futures` and in the start of their threads, could leave a lock held for
    good, and a thread behind it.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()
        self._ended: SimpleQueue[None] = SimpleQueue()
        for _ in range(DEPTH):
            self._room.put(None)
        self._error: BaseException | None = None
        self._given_up = False
        _thread.start_new_thread(self._work, ())

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if self._error is None and not self._given_up:
                function, arguments = call
                try:
                    function(*arguments)
                except BaseException as error:  # whoever gave it is to have it
                    self._error = error
                del function, arguments
            del call
            self._room.put(None)
        self._ended.put(None)

    def give(self, call: Call) -> None:
        self._room.get()
        if self._error is not None:
            raise self._error
        self._calls.put(call)

    def finish(self) -> None:
        for _ in range(DEPTH):
            self._room.get()
        for _ in range(DEPTH):
            self._room.put(None)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._given_up = True
        self._calls.put(None)
        self._ended.get()
        self._ended.put(None)


class Lanes:
    """A thread for each kind of work, which does what it is given one after another.

    Hashing, writing and most of torch let other threads run meanwhile. Whoever gives a lane more than it can do waits
    for it, so what is being worked on stays bounded. After a call that failed a lane does nothing more.

    Args:
        names: of the lanes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._lanes: dict[str, _Lane] = {}
        for name in names:
            self._lanes[name] = _Lane()

    def give(self, name: str, function: Callable[..., None], *arguments: Any) -> None:
        """Have a lane call a function; raises what an earlier call in that lane has raised."""
        self._lanes[name].give((function, arguments))

    def finish(self) -> None:
        """Wait until all is done; raises what a call has raised."""
        for lane in self._lanes.values():
            lane.finish()

    def close(self) -> None:
        """Give up what has not begun, and wait for what has."""
        for lane in self._lanes.values():
            lane.close()


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch use one thread an operation, while lanes keep the cores busy: its own would wait by spinning.

    Only where the main thread asks for it: the number is the whole process's, and others may be at work.
    """
    before = torch.get_num_threads()
    if threading.current_thread() is threading.main_thread():
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
