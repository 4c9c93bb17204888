"""Shows all frames on the event bus while somebody records, and costs next to nothing otherwise.

Stands between the loop and its transport, and is one itself. Frames are kept during a turn and
published when the loop is about to wait: no policy leaves later for being recorded.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from smartspec.daemon.event_bus import Bus, FrameEvent
from smartspec.engine_adapter import messages
from smartspec.engine_adapter.messages import MessageError, Resync

if TYPE_CHECKING:
    from smartspec.daemon.control_loop import Transport

log = logging.getLogger("smartspec.daemon")

LOOK_EVERY_S = 0.5  #: whether somebody records
MAX_PEERS = 4096  #: remembered, to be asked for who they are


class Tap:
    """A transport that is listened to.

    Parameters
    ----------
    transport : that carries the frames
    bus : where they are shown
    clock : the loop's, monotonic seconds
    """

    def __init__(
        self, transport: Transport, bus: Bus, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._transport = transport
        self._bus = bus
        self._clock = clock
        self._peers: OrderedDict[bytes, None] = OrderedDict()
        self._last_sent = b""
        self._recording = False
        self._look_at = clock()
        self._turn = 0
        self._taken: list[FrameEvent] = []

    def wait(self, timeout_s: float) -> bool:
        self._publish()
        self._turn += 1
        if self._clock() >= self._look_at:
            self._look_at = self._clock() + LOOK_EVERY_S
            self._look()
        return self._transport.wait(timeout_s)

    def receive(self) -> tuple[bytes, bytes] | None:
        received = self._transport.receive()
        if received is not None:
            peer, frame = received
            if peer not in self._peers:
                self._peers[peer] = None
                if len(self._peers) > MAX_PEERS:
                    self._peers.popitem(last=False)
            if self._recording:
                self._take(peer, frame, inbound=True)
        return received

    def send(self, peer: bytes, frame: bytes) -> bool:
        self._last_sent = frame
        arrives = self._transport.send(peer, frame)
        if not arrives:
            self._peers.pop(peer, None)
        elif self._recording:
            self._take(peer, frame, inbound=False)
        return arrives

    def reload(self) -> None:
        self._transport.reload()

    def close(self) -> None:
        self._publish()
        self._transport.close()

    @property
    def num_unsendable(self) -> int:
        return self._transport.num_unsendable

    @property
    def num_denied(self) -> int:
        return self._transport.num_denied

    def _take(self, peer: bytes, frame: bytes, inbound: bool) -> None:
        self._taken.append(
            FrameEvent(turn=self._turn, at_s=self._clock(), peer=peer, inbound=inbound, frame=frame)
        )

    def _publish(self) -> None:
        for event in self._taken:
            self._bus.publish(event)
        self._taken.clear()

    def _look(self) -> None:
        recording = self._bus.wants(FrameEvent)
        if recording and not self._recording:
            log.info("a recording begins: engines are asked to introduce themselves again")
            self._ask_all()
        elif self._recording and not recording:
            log.info("the recording has ended")
        self._recording = recording

    def _ask_all(self) -> None:
        """A recording needs every engine's Hello and roster, and these were sent long ago."""
        try:
            epoch = messages.decode_daemon_message(self._last_sent).daemon_epoch
        except MessageError:
            return  # nothing was ever sent, so there is nobody to ask
        frame = messages.encode(Resync(daemon_epoch=epoch, reason="a recording begins"))
        for peer in list(self._peers):
            self.send(peer, frame)
