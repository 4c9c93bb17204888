"""What an operator tells a running daemon, over a socket in its runtime directory.

Whoever may write to that directory may give commands: the socket has mode 0600. One frame of JSON
each way. The daemon looks once a turn, and never waits.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import zmq
from msgspec import Struct

from smartspec.daemon.config import Settings

EXIT_NO_DAEMON = 2
EXIT_REFUSED = 3
TIMEOUT_S = 5.0
MAX_BYTES = 4096
MAX_PER_TURN = 16


class Command(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``engine``: its name; empty: all, those that are still to come included."""

    action: Literal["pause", "release"]
    engine: str = ""


class Answer(Struct, frozen=True, kw_only=True):
    """What came of a command, in words."""

    text: str
    ok: bool = True


def endpoint(settings: Settings) -> str:
    """Where commands are heard."""
    return f"ipc://{Path(settings.runtime_dir) / 'commands.sock'}"


class CommandServer:
    """The daemon's end."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket

    @classmethod
    def bind(cls, address: str) -> CommandServer:
        """Listen at ``address``, an ipc endpoint. Raises zmq.ZMQError."""
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        socket.linger = 0
        socket.maxmsgsize = MAX_BYTES
        # By umask and not by chmod after: there is no moment in which others could connect.
        umask = os.umask(0o177)
        try:
            socket.bind(address)
        except zmq.ZMQError:
            socket.close()
            raise
        finally:
            os.umask(umask)
        return cls(socket)

    def serve(self, obey: Callable[[Command], Answer]) -> None:
        """Have what has arrived obeyed, and answer."""
        for _ in range(MAX_PER_TURN):
            try:
                peer, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                command = msgspec.json.decode(frames[-1] if frames else b"", type=Command)
                answer = obey(command)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                answer = Answer(ok=False, text=f"not a command of this version: {error}")
            try:
                self._socket.send_multipart((peer, msgspec.json.encode(answer)), zmq.NOBLOCK)
            except zmq.ZMQError:
                pass  # it did not wait

    def close(self) -> None:
        self._socket.close()


def send(address: str, command: Command, timeout_s: float = TIMEOUT_S) -> Answer | None:
    """Give a command; None: nobody answered in time."""
    with zmq.Context() as context:
        socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        socket.linger = 0
        try:
            socket.connect(address)
            socket.send(msgspec.json.encode(command))
            if not socket.poll(round(timeout_s * 1000)):
                return None
            return msgspec.json.decode(socket.recv(), type=Answer)
        finally:
            socket.close()


def run(settings: Settings, command: Command, timeout_s: float = TIMEOUT_S) -> int:
    """Give a command and print what came of it; returns the exit code."""
    path = endpoint(settings).removeprefix("ipc://")
    if os.access(path, os.F_OK) and not os.access(path, os.W_OK):
        print(
            f"smartspec {command.action}: {path} may not be opened by this user: only the daemon's "
            "user and root may say what is steered",
            file=sys.stderr,
        )
        return EXIT_NO_DAEMON
    answer = send(endpoint(settings), command, timeout_s)
    if answer is None:
        print(
            f"smartspec {command.action}: no daemon answers at {endpoint(settings)}: is "
            "`smartspec run` running, with the same runtime_dir?",
            file=sys.stderr,
        )
        return EXIT_NO_DAEMON
    print(answer.text, file=sys.stdout if answer.ok else sys.stderr)
    return 0 if answer.ok else EXIT_REFUSED
