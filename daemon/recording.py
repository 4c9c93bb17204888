"""What engines and daemon said to each other, in a file: bounded, compressed, versioned.

A gzip stream of records, each a length (u32, little-endian) and MessagePack: a `Header`, then
`FrameEvent` after `FrameEvent` in the order of the loop. A file that ends in the middle, since its
writer was killed, is good up to there. It holds no text of requests, only their numbers.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import msgspec
from msgspec import Struct

from smartspec.daemon.event_bus import FrameEvent
from smartspec.engine_adapter.messages import MAX_FRAME_BYTES

FORMAT = "smartspec-recording"
VERSION = 1
MAX_RECORD_BYTES = MAX_FRAME_BYTES + 4096
EXIT_UNUSABLE = 2  #: of a command to which its recording is of no use


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
