"""What the loop counts, and the one way in which it takes note of a fault of its own."""

from __future__ import annotations

import logging
from collections import Counter

log = logging.getLogger("smartspec.daemon")


class Counters(Counter[str]):
    """Totals by name since the daemon started; published once a second."""

    def failed(self, doing: str, engine: str = "") -> None:
        """Count the error being handled: it costs one engine one decision, never the loop.

        Only the first of a kind is logged, with its traceback.
        """
        name = f"failures_{doing}"
        self[name] += 1
        if self[name] == 1:
            log.exception(
                "error while %s for engine %s",
                doing,
                engine or "of an unknown peer",
                extra={"event": "failure", "engine": engine},
            )
