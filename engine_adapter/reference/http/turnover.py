"""How soon places come free, from how they came free lately."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

SOONEST_S = 1
LATEST_S = 60  #: OpenAI's clients believe no more
_NUM_ENDS = 64


class Turnover:
    """The mean time between ends of answers, over the last 64 for which others waited.

    Ends for which nobody waited tell how often is asked, not how fast is answered: with one of
    them the count begins anew. ``clock`` : seconds, monotonic.

    >>> times = iter([10.0, 14.0, 18.0])
    >>> turnover = Turnover(clock=lambda: next(times))
    >>> for _ in range(3):
    ...     turnover.ended(others_waited=True)
    >>> turnover.wait_s(num_places=2)
    8
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends_s: deque[float] = deque(maxlen=_NUM_ENDS)

    def ended(self, others_waited: bool) -> None:
        """Take note of an answer's end."""
        if others_waited:
            self._ends_s.append(self._clock())
        else:
            self._ends_s.clear()

    def wait_s(self, num_places: int) -> int:
        """Whole seconds until so many places are likely to be free, in [1, 60].

        1 while too little is known: fewer than two ends.
        """
        if len(self._ends_s) < 2:
            return SOONEST_S
        interval_s = (self._ends_s[-1] - self._ends_s[0]) / (len(self._ends_s) - 1)
        return min(max(math.ceil(num_places * interval_s), SOONEST_S), LATEST_S)
