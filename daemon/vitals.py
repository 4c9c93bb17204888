"""What the daemon's process knows of itself, beside what its loop counts."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import resource
from pathlib import Path


class Vitals:
    """Which daemon this is, what it uses, and how those beside the loop fare.

    Parameters
    ----------
    started_s : seconds since the Unix epoch; tells two daemons apart

    Attributes
    ----------
    num_telemetry_restarts : times that telemetry was started again after it had ended by itself
    is_reloaded : False: the last SIGHUP found what cannot be used, and left it as it was
    """

    def __init__(self, started_s: float) -> None:
        self.started_s = started_s
        self.num_telemetry_restarts = 0
        self.is_reloaded = True

    @staticmethod
    def cpu_s() -> tuple[float, float]:
        """Processor time of this process so far: its own, and the kernel's for it."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime, used.ru_stime

    @staticmethod
    def resident_bytes() -> int | None:
        """Memory in use; None: this system does not tell."""
        try:
            pages = Path("/proc/self/statm").read_text("ascii").split()[1]
        except OSError:
            return None
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


@functools.cache
def release() -> str:
    """Of this package."""
    return importlib.metadata.version("smartspec")
