"""Threads that share out tasks, each task from its beginning to its end."""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from queue import Empty, SimpleQueue
from typing import TypeAlias

import torch

MOST = 8  # threads at work: with more, those that compute wait for Python's lock

Task: TypeAlias = Generator[int, None, None]  # does a step and says how much it did


def share_out(tasks: Iterable[Task], threads: int, advance: Callable[[int], None]) -> None:
    """Have threads work through tasks, each begun in its turn, until all are done.

    Hashing, reading, writing and most of torch let other threads run meanwhile. What one task works on stays with one
    thread, and in the cache of its core. When a task or `advance` fails, or a signal raises, every task ends with the
    step that it is at, and the error is raised.

    Args:
        tasks: what is to be done; each step of each takes little time.
        threads: that do it.
        advance: called in this thread with what each step says.
    """
    # Only `SimpleQueue` is waited at: it is written in C. A signal whose handler raises between two lines of Python,
    # as in the locks of `threading` and `concurrent.futures` and in the start of their threads, could leave a lock
    # held for good, and whoever waits for it.
    waiting: SimpleQueue[Task] = SimpleQueue()
    begun: SimpleQueue[None] = SimpleQueue()
    ended: SimpleQueue[None] = SimpleQueue()
    events: SimpleQueue[int | BaseException | None] = SimpleQueue()  # None: a thread finds nothing more to do
    stopped: list[bool] = []

    def work() -> None:
        begun.put(None)  # before `stopped` is read: who is not seen to have begun reads it when it is set
        try:
            while not stopped and (task := _next(waiting)) is not None:
                with closing(task):
                    for count in task:
                        events.put(count)
                        if stopped:
                            break
            events.put(None)
        except BaseException as error:  # whoever shares out the tasks is to have it
            stopped.append(True)
            events.put(error)
        finally:
            ended.put(None)

    for task in tasks:
        waiting.put(task)
    try:
        for _ in range(threads):
            _thread.start_new_thread(work, ())
        idle = 0
        while idle < threads:
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                idle += 1
            else:
                advance(event)
    finally:
        stopped.append(True)
        _wait_for(ended, begun)


def _next(waiting: SimpleQueue[Task]) -> Task | None:
    try:
        return waiting.get_nowait()
    except Empty:
        return None


def _wait_for(ended: SimpleQueue[None], begun: SimpleQueue[None]) -> None:
    """Wait for all threads, even if another signal comes: what they work on is about to be closed and removed."""
    interruption: BaseException | None = None
    while True:
        try:
            while ended.qsize() < begun.qsize():
                time.sleep(1e-3)
            break
        except BaseException as error:
            interruption = error
    if interruption is not None:
        raise interruption


@contextmanager
def one_thread_each() -> Iterator[int]:
    """Have torch use one thread an operation, while workers keep the cores busy: its own would wait by spinning.

    Gives the number of workers for it: a core each, and one more for a core whose worker waits for the disk. Torch is
    told only where the main thread asks: the number is the whole process's, and others may be at work.
    """
    before = torch.get_num_threads()
    try:
        if threading.current_thread() is threading.main_thread():
            torch.set_num_threads(1)
        yield min(before + 1, MOST)
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
