"""Ends the process when its loop no longer turns, for supervisors that cannot tell."""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Callable

BEATS = 6  #: times that the end is put off within the limit, at most


class StuckExit:
    """Unless `alive` is called, ends the process: exit code 1, tracebacks on standard error.

    By a thread of the interpreter's own that needs no lock of Python's: a loop that hangs in an
    extension is ended too. Not where the whole process is stopped, which a supervisor sees.

    Parameters
    ----------
    limit_s : seconds without a turn; 0: never
    clock : monotonic seconds
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._next_at = clock()

    def alive(self) -> None:
        """Put the end off: call it every turn of the loop, from no other thread."""
        if not self._limit_s:
            return
        now = self._clock()
        if now >= self._next_at:
            self._next_at = now + self._limit_s / BEATS
            faulthandler.dump_traceback_later(self._limit_s, exit=True)

    def close(self) -> None:
        if self._limit_s:
            faulthandler.cancel_dump_traceback_later()
