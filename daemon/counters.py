"""What the loop counts, and the one way in which it takes note of a fault of its own."""

from __future__ import annotations

import logging
from collections import Counter

log = logging.getLogger("smartspec.daemon")

#: Told as 0 from the start: what first appears at 1 is no increase to Prometheus.
FROM_THE_START = (
    "cost_changes",
    "acceptance_changes",
    "decisions",
    "engines_connected",
    "engines_refused",
    "frames_refused",
    "frames_throttled",
    "hellos_throttled",
    "quarantines",
    "reports",
    "retreats",
    "states_refused",
    "steps_missed",
)
LOGGED = 64  #: kinds of faults, by engine, that are logged with their traceback


class Counters(Counter[str]):
    """Totals by name since the daemon started; published once a second."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(FROM_THE_START, 0))
        self._logged: set[tuple[str, str]] = set()

    def failed(self, doing: str, engine: str = "") -> None:
        """Count the error being handled: it costs one engine one decision, never the loop.

        Only an engine's first of a kind is logged, with its traceback.
        """
        name = f"failures_{doing}"
        self[name] += 1
        is_known = (doing, engine) in self._logged or len(self._logged) >= LOGGED
        if is_known and self[name] > 1:
            return
        self._logged.add((doing, engine))
        log.exception(
            "error while %s for engine %s",
            doing,
            engine or "of an unknown peer",
            extra={"event": "failure", "engine": engine},
        )
