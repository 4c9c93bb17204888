"""What was learned before, by kind of engine: where an engine that connects starts from."""

from __future__ import annotations

from smartspec.daemon.state.learned import (
    Checkpoint,
    Learned,
    ModelKey,
    RefusedState,
    fingerprint_id,
    restore,
)


class Library:
    """The newest checkpoint of each `ModelKey`; does no I/O.

    Parameters
    ----------
    max_kept : kinds of engines remembered; the least recently put are forgotten
    """

    def __init__(self, max_kept: int = 64) -> None:
        self.max_kept = max_kept
        self._kept: dict[str, Checkpoint] = {}
        self._refused: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, checkpoint: Checkpoint) -> None:
        """Take a checkpoint that was checked, in place of an older one of its key."""
        key_id = checkpoint.key.id
        self._kept.pop(key_id, None)
        self._kept[key_id] = checkpoint
        while len(self._kept) > self.max_kept:
            del self._kept[next(iter(self._kept))]

    def note_refused(self, key_id: str, why: str) -> None:
        """Remember that what was stored under ``key_id`` could not be used."""
        self._refused[key_id] = why

    @property
    def num_refused(self) -> int:
        return len(self._refused)

    def find(self, key: ModelKey) -> tuple[Learned, Checkpoint] | None:
        """Models of their own for an engine of ``key``, and what they are from."""
        checkpoint = self._kept.get(key.id)
        if checkpoint is None or checkpoint.key != key:
            return None
        try:
            return restore(checkpoint), checkpoint
        except RefusedState as error:
            self.note_refused(key.id, str(error))
            return None

    def why_not(self, key: ModelKey) -> str | None:
        """Why what is stored of ``key``'s fingerprint does not serve it; None: there is nothing."""
        if (why := self._refused.get(key.id)) is not None:
            return f"what was stored was refused: {why}"
        stem = fingerprint_id(key.fingerprint)
        for checkpoint in self._kept.values():
            if checkpoint.key.fingerprint == key.fingerprint:
                return f"what was stored is of other limits: {checkpoint.key.differences(key)}"
        for key_id, why in self._refused.items():
            if key_id.startswith(stem):
                return f"what was stored was refused: {why}"
        return None
