"""Who runs, in which cache row, and how much of each prompt goes into the next pass."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from smartspec.engine_adapter.reference.kv_cache import KvCache
from smartspec.engine_adapter.reference.sequence import Sequence


class Schedule(NamedTuple):
    """Work of one step."""

    decoding: list[Sequence]  #: by cache row; verify their drafts
    prefilling: list[tuple[Sequence, int]]  #: with the number of prompt tokens to process
    num_prefill_tokens: int


class Scheduler:
    """Who has waited longest is next; all decode, and prompts fill what is left of a token budget.

    A request's wait counts times its weight: one of weight 4 goes before those who have waited less
    than four times as long. Equal weights are first come, first served. In a bounded queue
    everybody's turn comes: of those who come later, ever fewer have waited long enough to pass.

    Parameters
    ----------
    max_num_running : requests decoded together: rows of the KV cache
    max_model_len : tokens that a request can have: length of a row
    max_prefill_tokens : prompt tokens per step
    caches : KV caches whose rows follow the requests
    """

    def __init__(
        self,
        max_num_running: int,
        max_model_len: int,
        max_prefill_tokens: int,
        caches: tuple[KvCache, ...],
    ) -> None:
        if min(max_num_running, max_model_len - 1, max_prefill_tokens) < 1:
            raise ValueError(
                "max_num_running and max_prefill_tokens must be >= 1 and max_model_len >= 2, got "
                f"{max_num_running}, {max_prefill_tokens} and {max_model_len}"
            )
        self.max_num_running = max_num_running
        self.max_model_len = max_model_len
        self.max_prefill_tokens = max_prefill_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival
        self._rows: list[Sequence | None] = [None] * max_num_running
        self._caches = caches

    @property
    def kv_usage(self) -> float:
        """Share of the KV room that holds tokens."""
        used = sum(sequence.num_computed for sequence in self.running)
        return used / (self.max_num_running * self.max_model_len)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take out a finished or cancelled request and free its row."""
        if sequence.row < 0:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self._rows[sequence.row] = None
        sequence.row = -1

    def admit(self, now_s: float) -> None:
        """Give free rows to waiting requests, and keep the rows in use together at the front.

        A hole that no request fills is closed by the last row in use. The copy costs about as much
        as reading the hole in the attention of two or three steps.
        """
        while self.waiting and len(self.running) < self.max_num_running:
            sequence = self._next(now_s)
            self.waiting.remove(sequence)
            self.running.append(sequence)
            self._place(sequence, self._rows.index(None))
        for target in range(len(self.running)):
            if self._rows[target] is None:
                last = next(row for row in reversed(self._rows) if row is not None)
                for cache in self._caches:
                    cache.move(last.row, target, last.num_tokens)
                self._rows[last.row] = None
                self._place(last, target)

    def schedule(self, now_s: float) -> Schedule:
        """Admit whom there is room for, and share out the step's tokens.

        ``now_s`` : on the clock of `Sequence.added_s`
        """
        self.admit(now_s)
        decoding = [s for s in self._rows if s is not None and s.decoding]
        prefilling = []
        room = self.max_prefill_tokens
        for sequence in self.running:
            if not sequence.decoding and room > 0:
                size = min(room, sequence.num_prompt - sequence.num_computed)
                prefilling.append((sequence, size))
                room -= size
        return Schedule(decoding, prefilling, self.max_prefill_tokens - room)

    def _next(self, now_s: float) -> Sequence:
        """Of those who wait; among equals the first."""
        return max(self.waiting, key=lambda s: s.request.weight * (now_s - s.added_s))

    def _place(self, sequence: Sequence, row: int) -> None:
        self._rows[row] = sequence
        sequence.row = row
