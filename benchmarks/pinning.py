"""Processes on cores of their own, so that what is measured is not what disturbs it."""

from __future__ import annotations

import os
from contextlib import suppress

import psutil


def pin(pid: int, cores: set[int]) -> None:
    """Bind a process' threads, those that are there, to cores; psutil binds the first one alone."""
    for thread in psutil.Process(pid).threads():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(thread.id, cores)
