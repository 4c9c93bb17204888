"""Servers that tests start, and waiting for what they do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis

from smartspec.daemon.telemetry.embedded_valkey import EmbeddedValkey


def eventually(what: Callable[[], Any], timeout_s: float = 15.0) -> Any:
    """What it returns once that is true; a server that does not answer yet is waited for."""
    deadline = time.monotonic() + timeout_s
    error: Exception | None = None
    while time.monotonic() < deadline:
        try:
            if value := what():
                return value
        except (redis.RedisError, OSError) as caught:
            error = caught
        time.sleep(0.03)
    raise AssertionError(f"did not happen within {timeout_s} s ({error})")


@contextlib.contextmanager
def valkey_server(path: Path) -> Iterator[EmbeddedValkey]:
    """The package's Valkey, on a Unix socket at ``path``."""
    server = EmbeddedValkey(path)
    server.ensure()
    try:
        yield server
    finally:
        server.close()
