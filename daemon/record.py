"""`smartspec record`: what engines and daemon say to each other, from the bus into a file."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from smartspec.daemon.config import Settings
from smartspec.daemon.event_bus import FrameEvent, Subscriber, subscribe
from smartspec.daemon.process.stopping import Stop
from smartspec.daemon.recording import EXIT_UNUSABLE, Writer

FLUSH_EVERY_S = 1.0  #: what a kill may cost
DAEMON_TIMEOUT_S = 5.0


def record(
    subscriber: Subscriber,
    writer: Writer,
    stop: Stop,
    seconds: float,
    max_bytes: int,
) -> str:
    """Write frames until told to stop, or a bound is reached; returns why it ended."""
    deadline = time.monotonic() + seconds
    heard_at = time.monotonic()
    flush_at = heard_at + FLUSH_EVERY_S
    while not stop.is_set():
        now = time.monotonic()
        if now >= deadline:
            return f"{seconds:g} s have passed"
        if writer.num_bytes >= max_bytes:
            return f"{max_bytes >> 20} MB are full"
        if now - heard_at > DAEMON_TIMEOUT_S:
            return "the daemon has gone silent"
        if now >= flush_at:
            flush_at = now + FLUSH_EVERY_S
            writer.flush()
        event = subscriber.poll(min(0.2, deadline - now))
        if event is not None:
            heard_at = time.monotonic()
        if isinstance(event, FrameEvent):
            writer.add(event)
    return "told to stop"


def run(settings: Settings, path: Path, seconds: float, max_bytes: int, stop: Stop) -> int:
    """Record what the daemon of these settings hears and says; returns the exit code."""
    subscriber = subscribe(settings.bus_endpoint, ("frame", "loop"))
    try:
        first = subscriber.poll(DAEMON_TIMEOUT_S)
        if first is None:
            return _fail(f"no daemon is heard at {settings.bus_endpoint}: is `smartspec run` up?")
        writer = Writer(path, time.time())
        try:
            if isinstance(first, FrameEvent):  # it may be what introduces an engine
                writer.add(first)
            why = record(subscriber, writer, stop, seconds, max_bytes)
        finally:
            writer.close()
    except FileExistsError:
        return _fail(f"{path}: is there already; name another file")
    except OSError as error:
        return _fail(f"{path}: cannot be written ({error.strerror}); what is in it is good")
    finally:
        subscriber.close()
    size = path.stat().st_size
    print(f"{path}: {writer.num_frames} frames, {size / 1e6:.1f} MB; {why}")
    if missed := subscriber.num_missed.get("frame", 0):
        print(f"{missed} frames were missed: this machine was too busy", file=sys.stderr)
    return 0


def _fail(text: str) -> int:
    print(f"smartspec record: {text}", file=sys.stderr)
    return EXIT_UNUSABLE
