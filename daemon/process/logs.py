"""Log lines: text for people, JSON, or fields for systemd's journal. One per event, not per step.

A record may say which ``event`` it is (as in the notes of the event bus) and of which ``engine``
(`extra=`); JSON and journal have both as fields of their own.

The journal is spoken to in its native protocol: a datagram of ``NAME=value`` lines, a value with
line breaks as its name, a length and the bytes (systemd.io/JOURNAL_NATIVE_PROTOCOL). A journal that
does not read is not waited for: the line is dropped, and the next one that gets through says how
many were.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Mapping

import msgspec

from smartspec.daemon.config import LogSettings

JOURNAL = "/run/systemd/journal/socket"
FIELDS = ("event", "engine")  #: of a record, where it has them
MAX_VALUE = 32_768  #: characters; a datagram holds some 200 kB
PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}  #: of syslog(3)


def _fields(record: logging.LogRecord) -> dict[str, str]:
    return {name: value for name in FIELDS if (value := getattr(record, name, ""))}


class JsonFormatter(logging.Formatter):
    """``{"time", "level", "logger", "event", "engine", "message"}``.

    The fields in the middle where there is such a thing; ``"error"`` with a traceback if any.
    """

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            **_fields(record),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class JournalHandler(logging.Handler):
    """Sends records to systemd's journal, with SMARTSPEC_EVENT and SMARTSPEC_ENGINE.

    Raises OSError when there is no journal at ``path``.
    """

    def __init__(self, path: str = JOURNAL) -> None:
        super().__init__()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self._num_dropped = 0
        try:
            self._socket.connect(path)
        except OSError:
            self._socket.close()
            raise

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + logging.Formatter().formatException(record.exc_info)
        fields = {
            "MESSAGE": message,
            "PRIORITY": str(PRIORITIES.get(record.levelname, 6)),
            "SYSLOG_IDENTIFIER": "smartspec",
            "LOGGER": record.name,
            **{f"SMARTSPEC_{name.upper()}": value for name, value in _fields(record).items()},
        }
        if self._num_dropped:
            fields["SMARTSPEC_LINES_DROPPED"] = str(self._num_dropped)
        try:
            self._socket.send(b"".join(_field(name, value) for name, value in fields.items()))
            self._num_dropped = 0
        except OSError:  # full, or being restarted
            self._num_dropped += 1

    def close(self) -> None:
        self._socket.close()
        super().close()


def _field(name: str, value: str) -> bytes:
    """One field of a datagram.

    >>> _field("PRIORITY", "6"), _field("A", "x\\ny")[:10]
    (b'PRIORITY=6\\n', b'A\\n\\x03\\x00\\x00\\x00\\x00\\x00\\x00\\x00')
    """
    data = value[:MAX_VALUE].encode("utf-8", "backslashreplace")
    if b"\n" not in data:
        return name.encode() + b"=" + data + b"\n"
    return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"


def is_in_journal(env: Mapping[str, str], file: int = 2) -> bool:
    """Whether what is written to ``file`` goes to the journal: systemd names device and inode."""
    try:
        found = os.fstat(file)
    except OSError:
        return False
    return env.get("JOURNAL_STREAM", "") == f"{found.st_dev}:{found.st_ino}"


def _handler(settings: LogSettings) -> logging.Handler:
    if settings.format == "auto" and is_in_journal(os.environ):
        try:
            return JournalHandler()
        except OSError:
            pass  # text, then, which reaches it all the same
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter()
        if settings.format == "json"
        else logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")
    )
    return handler


def configure(settings: LogSettings) -> None:
    """Set up the root logger; may be called again."""
    root = logging.getLogger()
    before, root.handlers[:] = list(root.handlers), [_handler(settings)]
    root.setLevel(settings.level.upper())
    for handler in before:
        if isinstance(handler, JournalHandler):
            handler.close()
