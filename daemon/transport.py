"""ZeroMQ, the daemon's side: one ROUTER socket that all engines connect to.

Knows peers and frames, nothing of what is in them. Never blocks but in `wait`; a frame for an
engine that does not read is dropped by ZeroMQ when that engine's queue is full.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from smartspec.daemon.admission.curve_keys import DaemonKeys
from smartspec.daemon.admission.zap import Doorkeeper
from smartspec.engine_adapter.messages import MAX_FRAME_BYTES

Peer = bytes  #: ZeroMQ's routing id of one connection

HANDSHAKE_MS = 2000
PING_MS = 1000  #: over tcp, whose other end may vanish without a word
PING_TIMEOUT_MS = 3000  #: shorter than the engine's: when it comes anew, its name is free
_LAST, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
SOCKET_MODE = 0o660  #: owner and group: the engines' group may connect


class Server:
    """Receives frames from engines and sends frames to them.

    Parameters
    ----------
    endpoint : ``ipc://PATH`` or ``tcp://ADDRESS:PORT``
    send_queue : frames kept for an engine that is slow to read; older policies are worthless
    receive_queue : frames kept per engine while the loop is busy
    max_frame_bytes : a connection that sends a larger frame is closed by ZeroMQ, unread

    keys : reads the daemon's keys and the list of engines; None: everyone may connect, in clear

    Attributes
    ----------
    num_denied : connections whose key is not on the list
    num_unsendable : frames dropped since their engine had gone or did not read
    """

    def __init__(
        self,
        endpoint: str,
        *,
        send_queue: int = 16,
        receive_queue: int = 256,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        keys: Callable[[], DaemonKeys] | None = None,
    ) -> None:
        self.endpoint = endpoint
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.SNDHWM, send_queue),
            (zmq.RCVHWM, receive_queue),
            (zmq.MAXMSGSIZE, max_frame_bytes),
            (zmq.ROUTER_MANDATORY, 1),  # say so when a frame cannot be sent
        ):
            self._socket.setsockopt(option, value)
        self._keys = keys
        self._doorkeeper: Doorkeeper | None = None
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        if keys is not None:
            self._encrypt(keys())
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
            self._socket.heartbeat_ivl = PING_MS
            self._socket.heartbeat_timeout = PING_TIMEOUT_MS
            self._socket.bind(endpoint)
        self.num_unsendable = 0

    def wait(self, timeout_s: float) -> bool:
        """Wait until a frame can be received; False when none came in time.

        Meanwhile whoever knocks is let in, or not.
        """
        if self._doorkeeper is None:
            return bool(self._poller.poll(max(0, round(timeout_s * 1000))))
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            ready = dict(self._poller.poll(round(left_s * 1000)))
            self._doorkeeper.answer()
            if self._socket in ready:
                return True
            if not ready and left_s <= 0.001:
                return False

    @property
    def num_denied(self) -> int:
        return 0 if self._doorkeeper is None else self._doorkeeper.num_denied

    def reload(self) -> None:
        """Read the list of engines anew. Raises `KeyFileError`, and the old list stays.

        The daemon's own pair, and connections that are open, stay as they are.
        """
        if self._keys is not None and self._doorkeeper is not None:
            self._doorkeeper.allowed = self._keys().allowed

    def _encrypt(self, keys: DaemonKeys) -> None:
        self._doorkeeper = Doorkeeper(self._context, keys.allowed)
        self._poller.register(self._doorkeeper.socket, zmq.POLLIN)
        self._socket.curve_server = True
        self._socket.curve_secretkey = keys.secret
        self._socket.zap_domain = b"smartspec"
        # Whoever is denied, or never says who it is, is hung up on, and may try again.
        self._socket.handshake_ivl = HANDSHAKE_MS

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
            self._socket.send(peer, _MORE)
            self._socket.send(frame, _LAST)
        except zmq.ZMQError as error:
            self.num_unsendable += 1
            return error.errno != zmq.EHOSTUNREACH
        return True

    def close(self) -> None:
        self._socket.close()
        if self._doorkeeper is not None:
            self._doorkeeper.close()
        self._context.term()
