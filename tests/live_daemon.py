"""A real daemon in a folder of its own, and an engine that works beside it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import numpy as np
import psutil
from scripted_engine import Costs, ScriptedEngine, hello

from smartspec.daemon import config
from smartspec.daemon.config import Settings
from smartspec.engine_adapter.link import EngineLink

STEP_S = 0.01


@contextlib.contextmanager
def folder() -> Iterator[str]:
    """One with a name short enough for Unix sockets."""
    path = tempfile.mkdtemp(prefix="ss-")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def daemon(
    runtime_dir: str, **overrides: object
) -> Iterator[tuple[Settings, subprocess.Popen[bytes]]]:
    """`smartspec run` with settings (``redis__url=...``), and these as it has them."""
    given = {"telemetry__prometheus_port": 0, "log__level": "warning", **overrides}
    named = {name.replace("__", "."): value for name, value in given.items()}
    settings = config.load(None, None, {"runtime_dir": runtime_dir, **named})
    words = [
        f"--set={name}={str(value).lower() if value is True or value is False else value}"
        for name, value in named.items()
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "smartspec.daemon.cli", "run", "--runtime-dir", runtime_dir, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield settings, process
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the daemon to stop, and leave no child of it behind."""
    if process.poll() is not None:
        return
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(children, 5)
    for child in alive:
        child.kill()


@contextlib.contextmanager
def engine(
    settings: Settings, name: str = "gpu0", acceptance: float = 0.7
) -> Iterator[ScriptedEngine]:
    """A scripted engine that steps a hundred times a second, in a thread of its own."""
    link = EngineLink(settings.endpoint, hello(name, epoch=time.time_ns() & 0xFFFFFFFF))
    scripted = ScriptedEngine(link, np.full(8, acceptance), Costs(base_s=0.008, token_s=0.0002))
    done = threading.Event()

    def work() -> None:
        while not done.wait(STEP_S):
            scripted.step()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield scripted
    finally:
        done.set()
        thread.join()
        link.close()
