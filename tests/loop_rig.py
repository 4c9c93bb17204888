"""A control loop on a fake transport and clock, for tests of the loop."""

from __future__ import annotations

from typing import Any

from fakes import Clock, FakeTransport, RecordingBus
from scripted_engine import hello

from smartspec.daemon import config
from smartspec.daemon.adoption.pauses import Pauses
from smartspec.daemon.control_loop import ControlLoop
from smartspec.daemon.state.library import Library
from smartspec.engine_adapter import messages as wire


class Rig:
    """A loop and what it is connected to."""

    def __init__(
        self,
        mode: str = "control",
        library: Library | None = None,
        pauses: Pauses | None = None,
        **control: Any,
    ) -> None:
        overrides = {"mode": mode, **{f"control.{k}": v for k, v in control.items()}}
        self.clock = Clock()
        self.transport = FakeTransport()
        self.bus = RecordingBus()
        self.settings = config.load(None, {}, overrides)
        self.loop = ControlLoop(
            self.settings, self.transport, self.bus, self.clock, lambda: 7.0, library, pauses
        )

    def cycle(self, peer: bytes = b"a", *messages: wire.Message | bytes) -> str | None:
        self.transport.put(peer, *messages)
        return self.loop.cycle(0.1)

    def connect(self, peer: bytes = b"a", name: str = "gpu0", epoch: int = 1) -> None:
        self.cycle(peer, hello(name, epoch))
        self.transport.sent.clear()

    def policies(self, peer: bytes = b"a") -> list[wire.Policy]:
        return self.transport.take(peer, wire.Policy)

    def session(self, name: str = "gpu0") -> Any:
        return self.loop.sessions.by_name[name]
