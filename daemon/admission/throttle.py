"""A rate that each peer may not exceed, so that one that is noisy takes nothing from the others."""

from __future__ import annotations

MAX_PEERS = 8192  #: remembered; a host has no more connections than a few thousand


class Throttle:
    """Token buckets, one per peer.

    Parameters
    ----------
    per_s : tokens that a peer earns per second
    burst : tokens that it can save up, and begins with
    """

    def __init__(self, per_s: float, burst: float) -> None:
        self.per_s = per_s
        self.burst = burst
        self._buckets: dict[bytes, tuple[float, float]] = {}  # tokens, as of a time

    def admits(self, peer: bytes, now: float) -> bool:
        """Whether ``peer`` may have one more thing done at ``now``, in monotonic seconds.

        >>> throttle = Throttle(per_s=10.0, burst=2.0)
        >>> [throttle.admits(b"a", at) for at in (0.0, 0.0, 0.0, 0.1, 0.1)]
        [True, True, False, True, False]
        """
        bucket = self._buckets.get(peer)
        if bucket is None:
            while len(self._buckets) >= MAX_PEERS:  # the one known longest
                del self._buckets[next(iter(self._buckets))]
            bucket = (self.burst, now)
        tokens = min(self.burst, bucket[0] + self.per_s * (now - bucket[1]))
        admitted = tokens >= 1.0
        self._buckets[peer] = (tokens - admitted, now)
        return admitted
