"""Threads that work side by side on what passes, each in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

DEPTH = 16  # calls that may wait in one lane: enough to bridge the writing of what `DirectFile` sends at once


class Lanes:
    """A thread for each kind of work, which does what it is given one after another.

    Hashing, writing and most of torch let other threads run meanwhile. Whoever gives a lane more than it can do waits
    for it, so what is being worked on stays bounded.

    Args:
        names: of the lanes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._threads = {name: ThreadPoolExecutor(1, thread_name_prefix=name) for name in names}
        self._waiting: dict[str, deque[Future[None]]] = {name: deque() for name in names}

    def give(self, name: str, function: Callable[..., None], *arguments: Any) -> None:
        """Have a lane call a function; raises what an earlier call in that lane has raised."""
        waiting = self._waiting[name]
        while waiting and (len(waiting) >= DEPTH or waiting[0].done()):
            waiting.popleft().result()
        waiting.append(self._threads[name].submit(function, *arguments))

    def finish(self) -> None:
        """Wait until all is done; raises what a call has raised."""
        for waiting in self._waiting.values():
            while waiting:
                waiting.popleft().result()

    def close(self) -> None:
        """Give up what has not begun, and wait for what has."""
        for thread in self._threads.values():
            thread.shutdown(wait=True, cancel_futures=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch use one thread an operation, while lanes keep the cores busy: its own would wait by spinning."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
