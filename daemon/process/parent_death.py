"""Children that do not outlive their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def follow_parent(parent: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Have this process sent a signal when process ``parent``, which started it, dies.

    Linux only (elsewhere it does nothing). The signal survives exec, not fork, and comes when the
    *thread* that started this process ends: start children from a thread that lives on. Called
    by the child and not between fork and exec, where little is safe in a process with threads.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died before the call
        raise SystemExit(0)
