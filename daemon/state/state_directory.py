"""Checkpoints as files: ``<key>.state`` in one directory, written whole or not at all.

A file that cannot be used is kept aside as ``<key>.state.refused`` (``.refused.2``, ...): it may be
of a newer release, or tell what went wrong. Nothing but the oldest checkpoints beyond the number
kept is ever deleted.
"""

from __future__ import annotations

import os
import re
import stat
import time
from pathlib import Path
from typing import NamedTuple

from smartspec.daemon.state.learned import MAX_BYTES, Checkpoint, RefusedState, check, decode

SUFFIX = ".state"
REFUSED = ".refused"
STALE_S = 3600.0  #: age at which another writer's unfinished file is taken for abandoned
_KEY_ID = re.compile(r"[0-9a-f]{16}-[0-9a-f]{8}")


class Stored(NamedTuple):
    """One file: its checkpoint, or why there is none."""

    path: Path
    checkpoint: Checkpoint | None
    why_not: str = ""

    @property
    def key_id(self) -> str:
        return self.path.name.partition(".")[0]


class StateDirectory:
    """Reads and writes the checkpoints in ``path``; several processes may.

    Parameters
    ----------
    path : created with mode 0700 when something is written
    max_kept : checkpoints kept; the oldest are deleted
    """

    def __init__(self, path: Path, max_kept: int = 64) -> None:
        self.path = path
        self.max_kept = max_kept

    # -- writing --------------------------------------------------------------------------------

    def write(self, key_id: str, frame: bytes) -> None:
        """Put ``frame`` in place of the older one, as a whole. Raises OSError."""
        if not _KEY_ID.fullmatch(key_id):
            raise ValueError(f"{key_id!r} is not the name of a checkpoint")
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = self.path / f".{key_id}.{os.getpid()}.partial"
        try:
            with os.fdopen(
                os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb"
            ) as file:
                file.write(frame)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path / f"{key_id}{SUFFIX}")
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        self._sync()
        self._prune()

    def _sync(self) -> None:
        # The new name is on disk only once the directory is.
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _prune(self) -> None:
        for path in self._files()[self.max_kept :]:
            path.unlink(missing_ok=True)

    # -- reading --------------------------------------------------------------------------------

    def load(self) -> list[Stored]:
        """All checkpoints, the newest first; those that cannot be used are put aside.

        Raises OSError when the directory cannot be read; one that does not exist is empty.
        """
        self._sweep_partial()
        stored = [self._read(path) for path in self._files()[: self.max_kept]]
        return [one if one.checkpoint else one._replace(path=_aside(one.path)) for one in stored]

    def entries(self) -> list[Stored]:
        """What lies there, refused files included; changes nothing. Raises OSError."""
        refused = [p for p in self._listed() if f"{SUFFIX}{REFUSED}" in p.name]
        return [self._read(path) for path in self._files() + sorted(refused)]

    def _listed(self) -> list[Path]:
        try:
            return list(self.path.iterdir())
        except FileNotFoundError:
            return []

    def _files(self) -> list[Path]:
        """Checkpoints, the newest first."""
        found = []
        for path in self._listed():
            if path.suffix == SUFFIX and not path.name.startswith("."):
                try:
                    found.append((path.lstat().st_mtime_ns, path))
                except FileNotFoundError:  # another process' pruning
                    continue
        return [path for _, path in sorted(found, reverse=True)]

    def _read(self, path: Path) -> Stored:
        key_id = path.name.partition(".")[0]
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                raise RefusedState("not a regular file")
            with path.open("rb") as file:
                frame = file.read(MAX_BYTES + 1)
            checkpoint = decode(frame, key_id)
            check(checkpoint)
        except OSError as error:
            return Stored(path, None, f"cannot be read ({error.strerror})")
        except RefusedState as error:
            return Stored(path, None, str(error))
        return Stored(path, checkpoint)

    def _sweep_partial(self) -> None:
        for path in self._listed():
            if path.suffix == ".partial" and path.name.startswith("."):
                try:
                    if time.time() - path.lstat().st_mtime > STALE_S:
                        path.unlink(missing_ok=True)
                except OSError:
                    continue


def _aside(path: Path) -> Path:
    """Rename a file that was refused; where that fails it stays, and is refused again."""
    aside = path.with_name(f"{path.name}{REFUSED}")
    number = 1
    while aside.exists() or aside.is_symlink():
        number += 1
        aside = path.with_name(f"{path.name}{REFUSED}.{number}")
    try:
        path.rename(aside)
    except OSError:
        return path
    return aside
