"""What the daemon tells the service manager: ready, alive, reloading, stopping (sd_notify(3)).

A datagram with lines of KEY=VALUE to the socket in $NOTIFY_SOCKET. Without one, nothing is sent.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
STATUS_EVERY_S = 5.0
BEATS = 3  #: watchdog beats per interval that systemd allows: two may be late


class Notifier:
    """The daemon's end. Never blocks, never raises: a deaf manager must not stop the loop.

    Parameters
    ----------
    env : with NOTIFY_SOCKET, and WATCHDOG_USEC and WATCHDOG_PID where a watchdog is wanted
    clock : monotonic seconds
    """

    def __init__(self, env: Mapping[str, str], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._socket: socket.socket | None = None
        self._address = env.get("NOTIFY_SOCKET", "")
        if self._address[:1] in ("/", "@"):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
            self._address = self._address.replace("@", "\0", 1)
        self._beat_s = _watchdog_s(env) / BEATS
        self._next_beat_at = clock()
        self._next_status_at = clock()

    def ready(self, status: str) -> None:
        """Engines can connect."""
        self._send(f"READY=1\nSTATUS={_line(status)}")

    def reloading(self) -> None:
        """Settings are being loaded anew; `ready` ends it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def alive(self, status: str | None) -> None:
        """Feed the watchdog and show ``status``, when it is time: call it every turn of the loop.

        From no other thread: it is the loop that must be known to turn.
        """
        if self._socket is None:
            return
        now = self._clock()
        if self._beat_s and now >= self._next_beat_at:
            self._next_beat_at = now + self._beat_s
            self._send("WATCHDOG=1")
        if status and now >= self._next_status_at:
            self._next_status_at = now + STATUS_EVERY_S
            self._send(f"STATUS={_line(status)}")

    def _send(self, text: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto(text.encode(), self._address)
        except OSError:
            pass

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _watchdog_s(env: Mapping[str, str]) -> float:
    """The interval that systemd allows, in seconds; 0: there is no watchdog."""
    given = env.get("WATCHDOG_USEC", "")
    if not given.isdigit() or env.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    return int(given) / 1e6


def _line(text: str) -> str:
    return " ".join(text.split())
