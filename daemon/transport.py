"""ZeroMQ, the daemon's side: one ROUTER socket that all engines connect to.

Knows peers and frames, nothing of what is in them. Never blocks but in `wait`; a frame for an
engine that does not read is dropped by ZeroMQ when that engine's queue is full.
"""

from __future__ import annotations

import os
from pathlib import Path

import zmq

from smartspec.engine_adapter.messages import MAX_FRAME_BYTES

Peer = bytes  #: ZeroMQ's routing id of one connection

SOCKET_MODE = 0o660  #: owner and group: the engines' group may connect


class Server:
    """Receives frames from engines and sends frames to them.

    Parameters
    ----------
    endpoint : ``ipc://PATH`` or ``tcp://ADDRESS:PORT``
    send_queue : frames kept for an engine that is slow to read; older policies are worthless
    receive_queue : frames kept per engine while the loop is busy

    Attributes
    ----------
    num_unsendable : frames dropped since their engine had gone or did not read
    """

    def __init__(self, endpoint: str, *, send_queue: int = 16, receive_queue: int = 256) -> None:
        self.endpoint = endpoint
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.SNDHWM, send_queue),
            (zmq.RCVHWM, receive_queue),
            (zmq.MAXMSGSIZE, MAX_FRAME_BYTES),
            (zmq.ROUTER_MANDATORY, 1),  # say so when a frame cannot be sent
        ):
            self._socket.setsockopt(option, value)
        if endpoint.startswith("ipc://"):
            path = Path(endpoint.removeprefix("ipc://"))
            path.parent.mkdir(parents=True, exist_ok=True)
            # By umask and not by chmod after: there is no moment in which others could connect.
            umask = os.umask(0o777 & ~SOCKET_MODE)
            try:
                self._socket.bind(endpoint)
            finally:
                os.umask(umask)
        else:
            self._socket.bind(endpoint)
        self.num_unsendable = 0

    def wait(self, timeout_s: float) -> bool:
        """Wait until a frame can be received; False when none came in time."""
        return bool(self._socket.poll(max(0, round(timeout_s * 1000)), zmq.POLLIN))

    def receive(self) -> tuple[Peer, bytes] | None:
        """The next frame and whom it is from, or None. Extra frames of a message make it b""."""
        try:
            parts = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return parts[0], parts[1] if len(parts) == 2 else b""

    def send(self, peer: Peer, frame: bytes) -> bool:
        """Send to one peer; dropped when it has gone or does not read. False: it has gone."""
        try:
            self._socket.send_multipart((peer, frame), zmq.NOBLOCK, copy=True)
        except zmq.ZMQError as error:
            self.num_unsendable += 1
            return error.errno != zmq.EHOSTUNREACH
        return True

    def close(self) -> None:
        self._socket.close()
        self._context.term()
