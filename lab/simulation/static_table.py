"""The best static table: a length for every batch size, requests being all alike.

What an operator tunes offline for an engine without a sidecar, and so also the rival `table`.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from smartspec.daemon import goodput
from smartspec.engine_adapter.simulator.profile import Profile
from smartspec.engine_adapter.simulator.requests import F64
from smartspec.lab.simulation.policies import BatchLength

WITHIN = 0.005


class Entry(msgspec.Struct, frozen=True):
    """A length for a range of batch sizes, both ends among them."""

    low: int
    high: int
    length: int


class Ground(msgspec.Struct, frozen=True):
    """What a table is tuned for: a profile, and an average request of the traffic."""

    gpu: Profile
    draft: str  #: one of the profile's, or "lookup"
    survival: tuple[float, ...]  #: probability that at least 1, 2, ... drafts are accepted
    presence: float  #: probability that there is anything to draft
    context: float  #: mean KV entries of a request

    def goodput(self, size: int) -> F64:
        """Tokens per second of a batch of ``size`` at each length for all, [max_length + 1]."""
        most = size * (1 + len(self.survival))
        curve = self.gpu.curve(size, int(size * self.context), (), most)
        draft, batches = self.gpu.draft(self.draft), np.array([size])
        survival = np.array(self.survival)
        found: F64 = goodput.by_length(survival, self.presence, batches, [curve], draft)[0]
        return found

    def table(self, max_num_running: int) -> tuple[Entry, ...]:
        """The best single length for every batch size, as ranges.

        A length is kept on while it is within `WITHIN` of the best: graph sizes make the best one
        jump to and fro for nothing.
        """
        entries: list[Entry] = []
        for size in range(1, max_num_running + 1):
            found = self.goodput(size)
            last = entries[-1] if entries else None
            if last and found[last.length] >= (1 - WITHIN) * found.max():
                entries[-1] = Entry(last.low, size, last.length)
            else:
                entries.append(Entry(size, size, int(np.argmax(found))))
        return tuple(entries)


class ListedLengths(BatchLength):
    """A table as an engine would run it (vLLM's, by batch size)."""

    def __init__(self, table: Sequence[Entry]) -> None:
        super().__init__()
        self._by_size = [0, *(e.length for e in table for _ in range(e.low, e.high + 1))]

    def at(self, num_running: int) -> int:
        return self._by_size[min(num_running, len(self._by_size) - 1)]


def beta_survival(mean: float, concentration: float, max_length: int) -> tuple[float, ...]:
    """P(at least j drafts are accepted) of a Beta over requests: its moments.

    >>> [round(s, 3) for s in beta_survival(0.5, 2.0, 2)]
    [0.5, 0.333]
    """
    j = np.arange(max_length, dtype=np.float64)
    hazards = (mean * concentration + j) / (concentration + j)
    return tuple(np.cumprod(hazards, dtype=np.float64).tolist())
