"""A process that is told to stop stops, however often and whenever it is told."""

from __future__ import annotations

import subprocess
import sys
import time

from smartspec.daemon.process.stopping import Stop

#: A thread sends signals as fast as it can while the main thread keeps beginning to wait.
STORM = """
import os, signal, threading
from smartspec.daemon.process.stopping import Stop

stop = Stop()
stop.install()
heard = threading.Event()

def send():
    for _ in range(5000):
        os.kill(os.getpid(), signal.SIGTERM)
    heard.set()

threading.Thread(target=send, daemon=True).start()
while not heard.is_set():
    stop.wait(0.001)
assert stop.is_set()
stop.close()
"""


def test_storm_of_signals_is_no_deadlock() -> None:
    subprocess.run([sys.executable, "-c", STORM], check=True, timeout=60)


def test_wait_ends_at_once_when_it_is_set() -> None:
    stop = Stop()
    assert not stop.wait(0.0)
    stop.set()
    began = time.monotonic()
    assert stop.wait(3600.0) and stop.is_set()
    assert time.monotonic() - began < 1800.0
    stop.close()
