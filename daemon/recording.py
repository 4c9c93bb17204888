"""What engines and daemon said to each other, in a file: bounded, compressed, versioned.

A gzip stream of records, each a length (u32, little-endian) and MessagePack: a `Header`, then
`FrameEvent` after `FrameEvent` in the order of the loop. A file that ends in the middle, since its
writer was killed, is good up to there. It holds no text of requests, only their numbers.
"""

from __future__ import annotations

import gzip
import os
import sys
import time
import zlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import msgspec
from msgspec import Struct

from smartspec.daemon.config import Settings
from smartspec.daemon.event_bus import FrameEvent, Subscriber, subscribe
from smartspec.daemon.process.stopping import Stop
from smartspec.engine_adapter.messages import MAX_FRAME_BYTES

FORMAT = "smartspec-recording"
VERSION = 1
MAX_RECORD_BYTES = MAX_FRAME_BYTES + 4096
FLUSH_EVERY_S = 1.0  #: what a kill may cost
DAEMON_TIMEOUT_S = 5.0
EXIT_UNUSABLE = 2


class RecordingError(ValueError):
    """A file that is no recording, or of another version. The message says which."""


class Header(Struct, frozen=True, kw_only=True):
    """How a recording begins."""

    format: str = FORMAT
    version: int = VERSION
    release: str = ""
    t_s: float = 0.0  #: when, in seconds since the Unix epoch


_frames = msgspec.msgpack.Decoder(FrameEvent)


class Writer:
    """Writes a new file, for its owner alone. Raises OSError, FileExistsError among them.

    Attributes
    ----------
    num_frames, num_bytes : written so far; bytes before compression
    """

    def __init__(self, path: Path, now: float) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._raw = os.fdopen(descriptor, "wb")
        self._file = gzip.GzipFile(fileobj=self._raw, mode="wb", compresslevel=6, mtime=0)
        self.num_frames = 0
        self.num_bytes = 0
        self._write(msgspec.msgpack.encode(Header(release=version("smartspec"), t_s=now)))

    def add(self, event: FrameEvent) -> None:
        self._write(msgspec.msgpack.encode(event))
        self.num_frames += 1

    def _write(self, record: bytes) -> None:
        self._file.write(len(record).to_bytes(4, "little") + record)
        self.num_bytes += 4 + len(record)

    def flush(self) -> None:
        self._file.flush()
        self._raw.flush()

    def close(self) -> None:
        self._file.close()
        self._raw.close()


def read(file: IO[bytes], name: str = "recording") -> Iterator[FrameEvent]:
    """The frames of a file, in order. Raises `RecordingError`."""
    stream = gzip.GzipFile(fileobj=file, mode="rb")
    header = _header(_record(stream), name)
    if header.version != VERSION:
        raise RecordingError(
            f"{name}: of version {header.version} (release {header.release}), expected {VERSION}"
        )
    while (record := _record(stream)) is not None:
        try:
            yield _frames.decode(record)
        except msgspec.DecodeError as error:
            raise RecordingError(f"{name}: not a frame: {error}") from error


def _record(stream: Any) -> bytes | None:
    """The next record; None: the file has ended, cleanly or not."""
    try:
        size = int.from_bytes(stream.read(4), "little")
        if not 0 < size <= MAX_RECORD_BYTES:
            return None
        record: bytes = stream.read(size)
    except (EOFError, OSError, zlib.error):
        return None
    return record if len(record) == size else None


def _header(record: bytes | None, name: str) -> Header:
    try:
        header = msgspec.msgpack.decode(record or b"", type=Header)
    except msgspec.DecodeError:
        header = None
    if header is None or header.format != FORMAT:
        raise RecordingError(f"{name}: not a recording of `smartspec record`")
    return header


# -- the command --------------------------------------------------------------------------------


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
