"""A run over time, in bins: load, lengths, goodput as predicted and as it came, latencies."""

from __future__ import annotations

import msgspec
import numpy as np

from smartspec.daemon.event_bus import BusEvent, DecisionEvent, Event
from smartspec.engine_adapter.base import StepFacts
from smartspec.engine_adapter.simulator.engine import Served
from smartspec.engine_adapter.simulator.requests import F64, I64

NUM_BINS = 120  #: of the time in which requests come; draining takes as many more as it needs


class Timeline(msgspec.Struct, frozen=True):
    """Aligned columns [bins]; NaN where nothing ran. Means are over the seconds of steps."""

    bin_s: float
    running: list[float]
    waiting: list[float]
    length_share: list[list[float]]  #: [bins][K + 1], of requests and steps, at length 0, 1, ...
    goodput: list[float]  #: tokens per second of steps
    predicted_goodput: list[float]  #: by the daemon, one step ahead; NaN: no daemon steered
    latency_sum_s: list[float]  #: of the requests that came in the bin


class Watch:
    """Collects a timeline: `step` is called after every step; it is a bus for the daemon too."""

    num_dropped = 0

    def __init__(self, duration_s: float, max_length: int) -> None:
        self._bin_s = duration_s / NUM_BINS
        self._counts: dict[int, I64] = {}
        self._sums: dict[int, F64] = {}
        self._width = max_length + 1
        self._predicted = float("nan")

    def publish(self, event: BusEvent) -> None:
        if isinstance(event, DecisionEvent):
            self._predicted = event.predicted_goodput

    def wants(self, kind: type[Event]) -> bool:
        return False

    def close(self) -> None:
        """There is nothing to close."""

    def step(self, now_s: float, facts: StepFacts) -> None:
        """Take in a step that has ended."""
        at = int(now_s / self._bin_s)
        counts = self._counts.get(at)
        if counts is None:
            counts = self._counts[at] = np.zeros(self._width, np.int64)
            self._sums[at] = np.zeros(6)
        size, seconds = facts.batch.size, facts.step_s
        counts += np.bincount(facts.num_drafted, minlength=self._width)
        decoding_s = seconds if size else 0.0
        self._sums[at] += (
            seconds,
            seconds * size,
            seconds * facts.num_waiting,
            float(facts.num_emitted.sum()),
            decoding_s * self._predicted if size else 0.0,
            decoding_s,
        )

    def timeline(self, served: Served) -> Timeline:
        """What was collected, with the latencies of ``served``."""
        arrived = (served.arrival_s / self._bin_s).astype(np.int64)
        num_bins = max([*self._sums, int(arrived.max(initial=-1))], default=-1) + 1
        sums, counts = np.zeros((num_bins, 6)), np.zeros((num_bins, self._width))
        for at, row in self._sums.items():
            sums[at], counts[at] = row, self._counts[at]
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = sums[:, 1:3] / sums[:, :1]
            goodput = sums[:, 3:5] / sums[:, 5:]
            shares = counts / counts.sum(axis=1, keepdims=True)
        return Timeline(
            bin_s=self._bin_s,
            running=mean[:, 0].tolist(),
            waiting=mean[:, 1].tolist(),
            length_share=shares.tolist(),
            goodput=goodput[:, 0].tolist(),
            predicted_goodput=goodput[:, 1].tolist(),
            latency_sum_s=np.bincount(arrived, served.latency_s, num_bins).tolist(),
        )
