"""Who may connect over CURVE: ZeroMQ asks (ZAP, RFC 27), the list of engines answers."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import zmq
from zmq.utils import z85

log = logging.getLogger("smartspec.daemon")

MAX_ASKED = 64  #: per look, so that knocking holds nobody up
TOLD = 3  #: denials that are logged; all are counted


class Doorkeeper:
    """Answers ZeroMQ's questions about new connections of one context.

    Must exist before the socket listens: without it ZeroMQ lets every key in.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], allowed: Mapping[bytes, str]
    ) -> None:
        self.allowed = allowed
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind("inproc://zeromq.zap.01")
        self.num_denied = 0

    def answer(self) -> None:
        """Answer all that ask now."""
        for _ in range(MAX_ASKED):
            try:
                asked = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._answer(asked)

    def _answer(self, asked: list[bytes]) -> None:
        version, request = (*asked, b"", b"")[:2]
        name = None
        if len(asked) >= 7 and asked[5] == b"CURVE" and len(asked[6]) == 32:
            name = self.allowed.get(z85.encode(asked[6]))
        if name is None:
            self.num_denied += 1
            if self.num_denied <= TOLD:
                address = asked[3].decode("ascii", "replace") if len(asked) > 3 else "?"
                log.warning("connection from %s denied: its key is not on the list", address)
            # 300, not 400: an engine that is put on the list later gets in without a restart.
            reply = (b"300", b"not on the list", b"")
        else:
            reply = (b"200", b"OK", name.encode())
        self.socket.send_multipart((version, request, *reply, b""))

    def close(self) -> None:
        self.socket.close()
