"""Engines that go on telling what cannot be true are not listened to for a while.

One bad frame may be the network's, or a rare bug's: it is refused, and that is all. Each counts
against its engine, each good report a little for it. An engine that has told too many is put in
quarantine: it runs on as configured, is told why, and what it has taught since the last checkpoint
is not believed. Every further quarantine lasts twice as long, until it has been good for as long.
"""

from __future__ import annotations

from typing import NamedTuple

GOOD_FOR = 1 / 20  #: of a bad frame, that one good report makes up for
LONGEST = 64  #: times the first quarantine
MAX_NAMES = 4096


class _Record(NamedTuple):
    score: float = 0.0
    until: float = -1e18  #: monotonic seconds
    lasts_s: float = 0.0  #: of the last quarantine
    why: str = ""


class Quarantine:
    """Who is in quarantine, and who is near it. Times are monotonic seconds.

    Parameters
    ----------
    after : bad frames, less a twentieth of the good ones, that it takes
    first_s : what the first quarantine lasts
    """

    def __init__(self, after: int, first_s: float) -> None:
        self.after = after
        self.first_s = first_s
        self._records: dict[str, _Record] = {}

    def blame(self, engine: str, why: str, now: float) -> float:
        """Count a bad frame; seconds of the quarantine that it brings, 0 for none."""
        record = self._records.get(engine, _Record())
        if record.score + 1 < self.after:
            self._keep(engine, record._replace(score=record.score + 1))
            return 0.0
        good_s = now - record.until
        again = record.lasts_s if good_s < record.lasts_s else 0.0
        lasts_s = min(2 * again or self.first_s, LONGEST * self.first_s)
        self._keep(engine, _Record(0.0, now + lasts_s, lasts_s, why))
        return lasts_s

    def credit(self, engine: str) -> None:
        """Count a good report."""
        record = self._records.get(engine)
        if record is not None and record.score:
            self._records[engine] = record._replace(score=max(0.0, record.score - GOOD_FOR))

    def left_s(self, engine: str, now: float) -> float:
        """Seconds that the engine must still wait; 0: it is not in quarantine."""
        record = self._records.get(engine)
        return 0.0 if record is None else max(0.0, record.until - now)

    def why(self, engine: str) -> str:
        """What it told last."""
        return self._records.get(engine, _Record()).why

    def _keep(self, engine: str, record: _Record) -> None:
        self._records[engine] = record
        if len(self._records) > MAX_NAMES:
            del self._records[next(iter(self._records))]
