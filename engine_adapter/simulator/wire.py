"""The wire within one process: frames between links and a daemon, in the order they were sent."""

from __future__ import annotations

from collections import deque

import zmq

from smartspec.engine_adapter.link import POLLIN, POLLOUT


class EngineSocket:
    """An engine's end: what `EngineLink` needs of a socket."""

    def __init__(self, peer: bytes, to_daemon: deque[tuple[bytes, bytes]]) -> None:
        self._peer = peer
        self._to_daemon = to_daemon
        self.inbox: deque[bytes] = deque()

    def getsockopt(self, option: int) -> int:
        """Which of reading and writing would not block."""
        return POLLOUT | POLLIN if self.inbox else POLLOUT

    def setsockopt(self, option: int, value: int) -> None:
        """There is nothing to set."""

    def send(self, frame: bytes, flags: int = 0) -> None:
        self._to_daemon.append((self._peer, frame))

    def recv(self, flags: int = 0) -> bytes:
        if not self.inbox:
            raise zmq.Again
        return self.inbox.popleft()

    def close(self) -> None:
        """There is nothing to close."""


class Wire:
    """The daemon's end: a transport for its loop."""

    def __init__(self) -> None:
        self.to_daemon: deque[tuple[bytes, bytes]] = deque()
        self._sockets: dict[bytes, EngineSocket] = {}
        self.num_unsendable = 0
        self.num_denied = 0

    def connect(self, name: str) -> EngineSocket:
        """A new engine's end."""
        peer = name.encode()
        socket = self._sockets[peer] = EngineSocket(peer, self.to_daemon)
        return socket

    def wait(self, timeout_s: float) -> bool:
        return bool(self.to_daemon)

    def receive(self) -> tuple[bytes, bytes] | None:
        return self.to_daemon.popleft() if self.to_daemon else None

    def send(self, peer: bytes, frame: bytes) -> bool:
        socket = self._sockets.get(peer)
        if socket is None:
            self.num_unsendable += 1
            return False
        socket.inbox.append(frame)
        return True

    def reload(self) -> None:
        """There are no keys to read."""

    def close(self) -> None:
        self._sockets.clear()
