"""Being told to stop, by a signal."""

from __future__ import annotations

import os
import select
import signal
from types import FrameType


class Stop:
    """Set by SIGTERM and SIGINT once `install` was called; never unset.

    Not a `threading.Event`: its lock is taken by ``wait`` and by a handler's ``set`` alike, in one
    thread. A signal that comes in the wrong microsecond, or a second one within the first one's
    handler (a dying parent sends one for every thread that it had), would wait for ever.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)

    def install(self) -> None:
        """Listen to signals; in the main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.set()

    def set(self) -> None:
        if not self._is_set:
            self._is_set = True
            os.write(self._writer, b"\0")

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is set, ``timeout_s`` at most; returns whether it is."""
        select.select([self._reader], [], [], timeout_s)
        return self._is_set

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)
