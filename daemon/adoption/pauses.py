"""Which engines an operator has paused. Outlives engines and the daemon, which may be restarted
by a watchdog: what a person has stopped starts again only when a person says so.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 20


class Pauses:
    """Names of paused engines, kept in a file.

    Parameters
    ----------
    path : JSON list of names; an empty name stands for all engines. None: kept in memory only
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._names: set[str] = set()
        if path is None:
            return
        try:
            with path.open("rb") as file:
                self._names = set(msgspec.json.decode(file.read(MAX_BYTES), type=list[str]))
        except FileNotFoundError:
            pass
        except (OSError, msgspec.DecodeError) as error:
            # Rather steer nothing than what somebody has stopped.
            self._names = {""}
            log.error(
                "%s cannot be read (%s): all engines are paused; `smartspec release` writes it "
                "anew",
                path,
                error,
            )

    def __contains__(self, engine: str) -> bool:
        return engine in self._names or "" in self._names

    def pause(self, engine: str) -> None:
        """Pause an engine, or with an empty name all. Raises OSError when that cannot be kept."""
        self._names.add(engine)
        self._write()

    def release(self, engine: str) -> None:
        """Undo it; with an empty name for all. Raises OSError when that cannot be kept.

        Raises ValueError when all are paused and one is to be released: name by name is not kept.
        """
        if engine and "" in self._names:
            raise ValueError("all engines are paused: release all (without a name)")
        if engine:
            self._names.discard(engine)
        else:
            self._names.clear()
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(sorted(self._names)))
        new.replace(self._path)
