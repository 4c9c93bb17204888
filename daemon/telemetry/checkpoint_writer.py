"""Writes checkpoints to files, in a thread of its own: a disk may be slow, full or gone."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from smartspec.daemon.event_bus import CheckpointEvent, NoteEvent
from smartspec.daemon.state.state_directory import StateDirectory

log = logging.getLogger(__name__)

RETRY_S = 5.0


class CheckpointWriter:
    """The newest checkpoint of each key goes to disk; what it replaces need not.

    Parameters
    ----------
    directory : where to
    tell : given a note when writing begins to fail, and when it works again
    retry_s : seconds between attempts while it fails

    Attributes
    ----------
    num_written, num_failures : checkpoints on disk, attempts that failed
    """

    def __init__(
        self,
        directory: StateDirectory,
        tell: Callable[[NoteEvent], None] = lambda note: None,
        retry_s: float = RETRY_S,
    ) -> None:
        self._directory = directory
        self._tell = tell
        self._retry_s = retry_s
        self._waiting: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.failing = False
        self.num_written = 0
        self.num_failures = 0

    def add(self, event: CheckpointEvent) -> None:
        """Take note of a checkpoint; never waits."""
        with self._lock:
            self._waiting[event.key_id] = event.frame
        if not self.failing:  # then at the next retry
            self._wake.set()

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what waits, within ``timeout_s``."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(self._retry_s if self.failing else None)
            self._wake.clear()
            self.flush()
        self.flush()  # what came while the last was written

    def flush(self) -> None:
        """Write all that waits; what fails waits on."""
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        for key_id, frame in waiting.items():
            try:
                self._directory.write(key_id, frame)
            except (OSError, ValueError) as error:
                self._failed(error)
                if isinstance(error, OSError):
                    with self._lock:
                        self._waiting.setdefault(key_id, frame)
            else:
                self.num_written += 1
                self._recovered()

    def _failed(self, error: Exception) -> None:
        self.num_failures += 1
        if not self.failing:  # once per outage
            text = (
                f"state.directory: {self._directory.path} cannot be written ({error}): learned "
                "state is not saved; steering goes on"
            )
            log.warning("%s", text)
            self._tell(NoteEvent(kind="state_unsaved", level="warning", text=text))
        self.failing = True

    def _recovered(self) -> None:
        if self.failing:
            text = f"learned state is saved again after {self.num_failures} failures"
            log.info("%s", text)
            self._tell(NoteEvent(kind="state_saved", text=text))
        self.failing = False
