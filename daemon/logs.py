"""Log lines on standard error: text for people, or one JSON object per line."""

from __future__ import annotations

import logging
import sys
import time

import msgspec

from smartspec.daemon.config import LogSettings


class JsonFormatter(logging.Formatter):
    """``{"time", "level", "logger", "message"}``, and ``"error"`` with a traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def configure(settings: LogSettings) -> None:
    """Set up the root logger; may be called again."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter()
        if settings.json
        else logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level.upper())
