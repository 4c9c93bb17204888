"""Where something was measured: without it, a figure means little."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """Python, processor, cores, accelerator and commit of this run; None: unknown or none."""
    return {
        "python": platform.python_version(),
        "cpu": _cpu(),
        "num_cpus": os.cpu_count(),
        "gpu": _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        "commit": _commit(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """Short hash, with a mark when the files are not those of the commit."""
    folder = str(Path(__file__).resolve().parent)
    commit = _output("git", "-C", folder, "rev-parse", "--short", "HEAD")
    if commit and _output("git", "-C", folder, "status", "--porcelain", "--untracked-files=no"):
        commit += "-modified"
    return commit


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
