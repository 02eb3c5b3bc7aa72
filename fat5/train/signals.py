"""Stop a run when it is asked to, at a place from which it can go on."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STOPPED = 75
"""Exit status of a run that saved and stopped because of a signal: EX_TEMPFAIL, try again (sysexits.h)."""


_NUMBERS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """While it is entered, SIGTERM and SIGINT are noted instead of ending the process; the second one ends it.

    Schedulers send SIGTERM some time before they kill: the run finishes its step, saves, and leaves.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in _NUMBERS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        for each, handler in self._before.items():
            signal.signal(each, handler)


def outlive_first(worker: int) -> None:
    """Let a process that prepares batches live through the first signal, as the run does that it works for.

    torchrun and Slurm send theirs to all of a run's processes, and a worker that ends takes the run with it, before
    anything is saved. What the run itself sends is obeyed at once: it waits for its workers' end. A `worker_init_fn`;
    torch has set a handler of its own by then, which ends the worker whoever it was.

    Args:
        worker: its number.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS; a Python handler would not be told who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, _NUMBERS)
        threading.Thread(target=_heed, daemon=True).start()


def _heed() -> None:
    for _ in range(2):
        if signal.sigwaitinfo(_NUMBERS).si_pid == os.getppid():
            break
    os._exit(0)
