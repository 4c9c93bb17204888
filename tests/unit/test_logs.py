"""Log lines as JSON and as the journal takes them."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from smartspec.daemon.config import LogSettings
from smartspec.daemon.process import logs


@pytest.fixture(autouse=True)
def root() -> Iterator[logging.Logger]:
    """The root logger, as it was afterwards."""
    logger = logging.getLogger()
    handlers, level = list(logger.handlers), logger.level
    yield logger
    for handler in set(logger.handlers) - set(handlers):
        handler.close()
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A stand-in for the journal's socket, which standard error is said to go to."""
    with tempfile.TemporaryDirectory(prefix="ss-") as folder:
        path = str(Path(folder) / "socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
            receiver.bind(path)
            receiver.settimeout(5.0)
            monkeypatch.setattr(logs.JournalHandler.__init__, "__defaults__", (path,))
            error = os.fstat(2)
            monkeypatch.setenv("JOURNAL_STREAM", f"{error.st_dev}:{error.st_ino}")
            yield receiver


def fields(datagram: bytes) -> dict[str, str]:
    """As the journal reads it."""
    found = {}
    while datagram:
        line, _, rest = datagram.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + size], rest[9 + size :]
        found[name.decode()] = value.decode()
        datagram = rest
    return found


def test_json_has_the_event_and_its_engine(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogSettings(format="json"))
    extra = {"event": "warm_start", "engine": "gpu0"}
    logging.getLogger("smartspec.daemon").warning("starts from %d steps", 7, extra=extra)
    logging.getLogger("x").info("plain")
    first, second = (msgspec.json.decode(line) for line in capsys.readouterr().err.splitlines())
    assert first.pop("time").endswith("Z") and second.pop("time")
    assert first == {
        "level": "warning",
        "logger": "smartspec.daemon",
        "event": "warm_start",
        "engine": "gpu0",
        "message": "starts from 7 steps",
    }
    assert second == {"level": "info", "logger": "x", "message": "plain"}


def test_journal_gets_fields_and_a_traceback_in_one_message(journal: socket.socket) -> None:
    logs.configure(LogSettings())
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("x").exception("failed", extra={"event": "failure", "engine": "gpu0"})
    found = fields(journal.recv(1 << 16))
    message = found.pop("MESSAGE").splitlines()
    assert (message[0], message[-1]) == ("failed", "ValueError: broken")
    assert found == {
        "PRIORITY": "3",
        "SYSLOG_IDENTIFIER": "smartspec",
        "LOGGER": "x",
        "SMARTSPEC_EVENT": "failure",
        "SMARTSPEC_ENGINE": "gpu0",
    }


def test_journal_that_does_not_read_is_not_waited_for(journal: socket.socket) -> None:
    logs.configure(LogSettings())
    for _ in range(10_000):  # far more than a socket's queue holds
        logging.getLogger("x").info("line")
    num_read = 0
    journal.setblocking(False)
    while True:
        try:
            journal.recv(1 << 16)
        except BlockingIOError:
            break
        num_read += 1
    assert num_read < 10_000
    logging.getLogger("x").info("line")
    assert fields(journal.recv(1 << 16))["SMARTSPEC_LINES_DROPPED"] == str(10_000 - num_read)


@pytest.mark.parametrize("format_", ["text", "json"])
def test_journal_is_left_alone_when_another_format_is_asked_for(
    journal: socket.socket, format_: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(msgspec.convert({"format": format_}, LogSettings))
    logging.getLogger("x").info("line")
    assert "line" in capsys.readouterr().err
    journal.setblocking(False)
    with pytest.raises(BlockingIOError):
        journal.recv(1)


def test_text_is_written_when_standard_error_is_no_journal(
    journal: socket.socket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "1:1")
    logs.configure(LogSettings())
    logging.getLogger("x").info("line")
    assert "INFO    line" in capsys.readouterr().err
