"""What the service manager is told, through a stand-in for its socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import Clock

from smartspec.daemon.process.notify import BEATS, STATUS_EVERY_S, Notifier


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.setblocking(False)
        name = f"\0smartspec-test-{os.getpid()}"
        end.bind(name)
        yield end


def env(**more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": f"@smartspec-test-{os.getpid()}", **more}


def told(manager: socket.socket) -> list[str]:
    lines = []
    while True:
        try:
            lines += manager.recv(4096).decode().splitlines()
        except BlockingIOError:
            return lines


def test_readiness_comes_with_a_status_of_one_line(manager: socket.socket) -> None:
    notifier = Notifier(env())
    notifier.ready("control\nREADY=0 mode")
    assert told(manager) == ["READY=1", "STATUS=control READY=0 mode"]
    notifier.close()


def test_watchdog_is_fed_three_times_per_interval_however_often_the_loop_turns(
    manager: socket.socket,
) -> None:
    clock = Clock()
    notifier = Notifier(env(WATCHDOG_USEC="3000000"), clock)
    for _ in range(301):
        notifier.alive(None)
        clock.now += 0.01
    beats = told(manager)
    assert set(beats) == {"WATCHDOG=1"}
    assert abs(len(beats) - BEATS) <= 1
    notifier.close()


def test_no_beat_is_sent_when_the_watchdog_is_another_process(manager: socket.socket) -> None:
    clock = Clock()
    for more in ({}, {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}):
        notifier = Notifier(env(**more), clock)
        clock.now += 60
        notifier.alive(None)
        assert told(manager) == []
        notifier.close()


def test_status_is_told_now_and_then(manager: socket.socket) -> None:
    clock = Clock()
    notifier = Notifier(env(), clock)
    for _ in range(100):
        notifier.alive("3 running")
    assert told(manager) == ["STATUS=3 running"]
    clock.now += STATUS_EVERY_S
    notifier.alive("4 running")
    assert told(manager) == ["STATUS=4 running"]
    notifier.close()


def test_nothing_is_sent_and_nothing_fails_when_there_is_no_manager() -> None:
    for environment in ({}, {"NOTIFY_SOCKET": "/nowhere/notify"}, {"NOTIFY_SOCKET": "vsock:2:3"}):
        notifier = Notifier({**environment, "WATCHDOG_USEC": "1"})
        notifier.ready("here")
        notifier.alive("there")
        notifier.reloading()
        notifier.stopping()
        notifier.close()
        notifier.ready("after")
