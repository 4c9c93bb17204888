"""Commands to a running daemon: who may give them, and what cannot disturb it."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from fakes import ipc_endpoint, until

from smartspec.daemon.commands import (
    EXIT_NO_DAEMON,
    Answer,
    Command,
    CommandServer,
    run,
    send,
)
from smartspec.daemon.config import load


@pytest.fixture
def address() -> Iterator[str]:
    with ipc_endpoint() as endpoint:
        yield endpoint


@pytest.fixture
def server(address: str) -> Iterator[CommandServer]:
    made = CommandServer.bind(address)
    yield made
    made.close()


def test_command_is_obeyed_and_answered(address: str, server: CommandServer) -> None:
    heard: list[Command] = []
    answers: list[Answer | None] = []

    def obey(command: Command) -> Answer:
        heard.append(command)
        return Answer(text="done")

    command = Command(action="pause", engine="gpu0")
    asking = threading.Thread(target=lambda: answers.append(send(address, command)))
    asking.start()
    until(lambda: not asking.is_alive(), lambda: server.serve(obey))
    asking.join()
    assert heard == [command] and answers == [Answer(text="done")]


def test_socket_is_for_its_owner_alone(address: str, server: CommandServer) -> None:
    mode = Path(address.removeprefix("ipc://")).stat().st_mode
    assert stat.S_IMODE(mode) == 0o600


def test_who_may_not_open_the_socket_is_told_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = load(None, {}, {"runtime_dir": str(tmp_path)})
    (tmp_path / "commands.sock").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.F_OK)  # root may all
    assert run(settings, Command(action="pause")) == EXIT_NO_DAEMON
    assert "may not be opened by this user" in capsys.readouterr().err


def test_nonsense_is_answered_and_obeyed_by_nobody(address: str, server: CommandServer) -> None:
    def obey(command: Command) -> Answer:
        raise AssertionError("obeyed")

    for frames in ([b"{"], [b'{"action":"stop"}'], [b'{"action":"pause","x":1}'], [b"\xff"], []):
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(address)
            socket.send_multipart(frames if frames else [*frames, b""])
            until(lambda s=socket: s.poll(0), lambda: server.serve(obey))
            assert b'"ok":false' in socket.recv()


def test_nobody_answers_in_time_when_there_is_no_daemon(address: str) -> None:
    assert send(address, Command(action="release"), timeout_s=0.05) is None
