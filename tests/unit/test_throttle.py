"""Rates per peer."""

from __future__ import annotations

from smartspec.daemon.admission import throttle
from smartspec.daemon.admission.throttle import Throttle


def test_rate_is_kept_over_time_however_hard_a_peer_tries() -> None:
    limit = Throttle(per_s=50.0, burst=10.0)
    admitted = sum(limit.admits(b"a", i / 1000) for i in range(4000))
    assert 200 <= admitted <= 211


def test_peers_do_not_share() -> None:
    limit = Throttle(per_s=1.0, burst=1.0)
    assert not all(limit.admits(b"noisy", 0.0) for _ in range(5))
    assert limit.admits(b"quiet", 0.0)


def test_peers_remembered_are_bounded() -> None:
    limit = Throttle(per_s=1.0, burst=1.0)
    for i in range(throttle.MAX_PEERS + 100):
        limit.admits(str(i).encode(), 0.0)
    assert len(limit._buckets) == throttle.MAX_PEERS
