"""Connections over tcp whose other end is gone without a word, as when its node loses power."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from fakes import RecordingBus, free_port
from live_daemon import daemon, folder
from scripted_engine import ScriptedEngine, hello

from smartspec.daemon import config, transport
from smartspec.daemon.control_loop import ControlLoop
from smartspec.daemon.transport import Server
from smartspec.engine_adapter import link as link_module
from smartspec.engine_adapter.link import EngineLink

pytestmark = pytest.mark.integration
STEERED = ("policy", "probe")
PROMPT_S = 15.0  #: far less than the kernel takes to notice, or ZeroMQ to give up a handshake


class Relay:
    """Hands bytes on in both directions; what it carries while `silent` is lost, and all after it.

    It takes bytes and connections all the same: neither end sees anything but silence.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self.port = int(self._listener.getsockname()[1])
        self.silent = False
        self.num_connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [near, far]
                self.num_connections += 1
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        dead = False
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                dead |= self.silent
                if not dead:
                    sink.sendall(data)
            if not dead:
                sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence is noticed ten times as soon."""
    for module in (transport, link_module):
        monkeypatch.setattr(module, "PING_MS", module.PING_MS // 10)
        monkeypatch.setattr(module, "PING_TIMEOUT_MS", module.PING_TIMEOUT_MS // 10)


def engine(stack: ExitStack, port: int) -> ScriptedEngine:
    link = EngineLink(f"tcp://127.0.0.1:{port}", hello())
    stack.callback(link.close)
    return ScriptedEngine(link, np.full(4, 0.7))


@pytest.mark.usefixtures("quick")
def test_link_finds_the_daemon_again_when_its_connection_went_silent(stack: ExitStack) -> None:
    port = free_port()
    server = Server(f"tcp://127.0.0.1:{port}")
    loop = ControlLoop(config.load(env={}), server, RecordingBus())
    stack.callback(loop.close)
    relay = Relay(port)
    stack.callback(relay.close)
    load = engine(stack, relay.port)

    def promptly(condition: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + PROMPT_S
        while not condition():
            assert time.monotonic() < deadline, otherwise
            load.step()
            loop.cycle(0.002)

    def is_steered() -> bool:
        return bool(load.choices) and load.choices[-1].source in STEERED

    promptly(is_steered, "it is never steered")
    peer = next(iter(loop.sessions.by_peer))
    relay.silent = True
    promptly(lambda: relay.num_connections == 2, "the link takes its connection for alive")
    promptly(lambda: relay.num_connections == 3, "the link waits for one that never said a word")
    promptly(lambda: not is_steered(), "it is steered by a daemon that it cannot hear")
    assert not server.send(peer, b""), "the daemon takes the old connection for alive"
    relay.silent = False
    promptly(is_steered, "it is not steered again")


def test_step_never_waits_and_the_engine_is_steered_again_when_a_daemon_stood_still(
    stack: ExitStack,
) -> None:
    port = free_port()
    directory = stack.enter_context(folder())
    settings = {"endpoint": f"tcp://127.0.0.1:{port}", "insecure": True}
    _, process = stack.enter_context(daemon(directory, telemetry__enabled=False, **settings))
    load = engine(stack, port)
    slowest_s = 0.0

    def run(seconds: float, until: tuple[str, ...] = ()) -> str:
        nonlocal slowest_s
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            began = time.perf_counter()
            load.step()
            slowest_s = max(slowest_s, time.perf_counter() - began)
            if load.choices[-1].source in until:
                break
            time.sleep(0.005)
        return load.choices[-1].source

    assert run(2 * PROMPT_S, STEERED) in STEERED
    run(1.0)
    os.kill(process.pid, signal.SIGSTOP)
    stack.callback(os.kill, process.pid, signal.SIGCONT)
    assert run(link_module.PING_TIMEOUT_MS / 1000 + 3.0) == "fallback"
    os.kill(process.pid, signal.SIGCONT)
    assert run(PROMPT_S, STEERED) in STEERED
    assert slowest_s < 1.0
    assert load.source.stats.num_errors == 0
