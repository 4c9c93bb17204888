"""Where per-request counts live: rows of one array, found by id, the least recently seen reused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from smartspec.estimators.base import F64, State, pack, unpack

Rows = npt.NDArray[np.intp]


class RequestRows:
    """A bounded map from request ids to rows of ``counts`` [capacity, num_columns].

    A request that left the batch (preempted, say) keeps its row until the room is needed. Looking
    ids up costs a dictionary access each, so that callers keep the rows while the batch lasts;
    the next call of `rows` may hand vanished requests' rows to others.

    Parameters
    ----------
    capacity : rows; a batch of more requests than half of them makes the array grow to twice it
    num_columns : counts per request, 0 at first
    """

    def __init__(self, capacity: int, num_columns: int) -> None:
        if capacity < 1:
            raise ValueError(f"room for at least one request is needed, got {capacity}")
        self.counts: F64 = np.zeros((capacity, num_columns))
        self._row_of: dict[int, int] = {}
        self._id_of: list[int | None] = [None] * capacity
        self._last_seen = np.zeros(capacity, np.int64)
        self._free = list(range(capacity - 1, -1, -1))
        self._tick = 0
        self._found: Rows | None = None  # what `rows` gave last

    def __len__(self) -> int:
        return len(self._row_of)

    @property
    def capacity(self) -> int:
        return len(self._id_of)

    def find(self, request_id: int) -> int | None:
        """The row of one request, if it has one."""
        return self._row_of.get(request_id)

    def check(self, rows: Rows) -> None:
        """Raise ValueError unless ``rows`` are rows of this map."""
        if rows is self._found:
            return
        if rows.size and not (0 <= int(rows.min()) and int(rows.max()) < self.capacity):
            raise ValueError("rows are not of this estimator")

    def rows(self, ids: npt.ArrayLike) -> Rows:
        """Rows [B] of the requests ``ids`` [B] (unique integers >= 0); new ones start at 0."""
        array = np.asarray(ids)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ValueError("request ids must be a column of integers")
        wanted: list[int] = array.tolist()
        if array.dtype.kind == "i" and wanted and min(wanted) < 0:
            raise ValueError("request ids must be >= 0")
        if len(set(wanted)) != len(wanted):
            raise ValueError("request ids must be unique")
        self._tick += 1
        row_of = self._row_of
        rows = self._found = np.array([row_of.get(id, -1) for id in wanted], np.intp)
        new = np.flatnonzero(rows < 0).tolist()
        self._last_seen[rows[rows >= 0] if new else rows] = self._tick
        if new:
            self._make_room(len(new), len(wanted))
            for i in new:
                row = self._free.pop()
                row_of[wanted[i]] = row
                self._id_of[row] = wanted[i]
                rows[i] = row
            fresh = rows[new]
            self.counts[fresh] = 0.0
            self._last_seen[fresh] = self._tick
        return rows

    def _make_room(self, num_new: int, batch: int) -> None:
        if 2 * batch > self.capacity:
            more = 2 * batch - self.capacity
            self._free[:0] = range(self.capacity + more - 1, self.capacity - 1, -1)
            self.counts = np.concatenate((self.counts, np.zeros((more, self.counts.shape[1]))))
            self._last_seen = np.concatenate((self._last_seen, np.zeros(more, np.int64)))
            self._id_of += [None] * more
        if num_new <= len(self._free):
            return
        # An eighth at once, so that a stream of short requests does not pay for it at every step.
        used = np.array(list(self._row_of.values()), np.intp)
        count = max(num_new - len(self._free), min(self.capacity // 8, len(used) - batch))
        # Stable: which of the equally old ones go must not depend on anything but the history.
        for row in used[np.argsort(self._last_seen[used], kind="stable")[:count]].tolist():
            request_id = self._id_of[row]
            assert request_id is not None
            del self._row_of[request_id]
            self._id_of[row] = None
            self._free.append(row)

    def state(self) -> State:
        used = list(self._row_of.values())
        return {
            "ids": list(self._row_of),
            "rows": used,
            "free": list(self._free),
            "last_seen": self._last_seen[used].tolist(),
            "tick": self._tick,
            "counts": pack(self.counts[used]),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a `state`; raise ValueError when it is not one."""
        ids, used, free = ([int(n) for n in state[name]] for name in ("ids", "rows", "free"))
        capacity = len(used) + len(free)
        if sorted(used + free) != list(range(capacity)) or len(set(ids)) != len(used):
            raise ValueError("requests do not match their rows")
        counts = unpack(state, "counts", (len(used), self.counts.shape[1]))
        if counts.min(initial=0.0) < 0.0 or capacity < 1:
            raise ValueError("counts of requests are negative")
        last_seen = np.array(state["last_seen"], np.int64)
        if len(last_seen) != len(used):
            raise ValueError("requests do not match their times")
        self._row_of = dict(zip(ids, used, strict=True))
        self._id_of = [None] * capacity
        for request_id, row in self._row_of.items():
            self._id_of[row] = request_id
        self.counts = np.zeros((capacity, self.counts.shape[1]))
        self.counts[used] = counts
        self._last_seen = np.zeros(capacity, np.int64)
        self._last_seen[used] = last_seen
        self._free = free
        self._tick = int(state["tick"])
        self._found = None
