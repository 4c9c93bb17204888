"""Who is put in quarantine, for how long, and who is not."""

from __future__ import annotations

import pytest

from smartspec.daemon.admission.quarantine import Quarantine


def test_quarantine_comes_after_so_many_bad_frames_and_passes() -> None:
    quarantine = Quarantine(after=3, first_s=10.0)
    assert [quarantine.blame("a", "nan", 5.0) for _ in range(3)] == [0.0, 0.0, 10.0]
    assert quarantine.left_s("a", 7.0) == pytest.approx(8.0)
    assert quarantine.why("a") == "nan"
    assert quarantine.left_s("a", 15.0) == 0.0
    assert quarantine.left_s("b", 7.0) == 0.0


def test_rare_bad_frames_never_add_up_when_good_reports_come_between() -> None:
    quarantine = Quarantine(after=3, first_s=10.0)
    for _ in range(100):
        assert quarantine.blame("a", "network", 0.0) == 0.0
        for _ in range(20):
            quarantine.credit("a")


def test_quarantine_doubles_when_it_taught_nothing_and_is_forgotten_when_it_did() -> None:
    quarantine = Quarantine(after=1, first_s=10.0)
    now, lasted = 0.0, []
    for _ in range(8):
        lasted.append(quarantine.blame("a", "", now))
        now += lasted[-1] + 1
    assert lasted == [10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 640.0]
    assert quarantine.blame("a", "", now + 1000) == 10.0
