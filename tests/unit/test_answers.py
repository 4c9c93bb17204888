"""What drafts brought at each position of an answer, from an engine's own reports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from smartspec.daemon.event_bus import FrameEvent
from smartspec.daemon.recording import Writer
from smartspec.engine_adapter.base import (
    FEATURE_LAST_SHARE,
    FEATURE_MATCH_AGREEMENT,
    DecodeBatch,
    FixedLength,
    StepFacts,
)
from smartspec.engine_adapter.lengths import Choice
from smartspec.lab.profiles import answers, observed
from smartspec.lab.profiles.observed import Observed, Visit
from smartspec.lab.simulation.workload import Workload
from smartspec.lab.simulation.world import Cell, Fleet, _hello, serve, simulate

LOOKUP = Workload(profile="h100_8b", draft="lookup", presence=1.0, duration_s=3.0, mean_output=60)


def watched(cell: Cell) -> tuple[Cell, dict[int, list[Visit]]]:
    """A cell that notes what its steps do, as an engine would report it."""
    visits: dict[int, list[Visit]] = {}

    def watch(now_s: float, facts: StepFacts) -> None:
        batch = facts.batch
        columns = (facts.num_emitted, facts.num_drafted, facts.num_accepted, batch.ceiling)
        rows = zip(batch.request_ids.tolist(), *(c.tolist() for c in columns), strict=True)
        for (request, *counts), told in zip(rows, batch.features.T.tolist(), strict=True):
            visits.setdefault(request, []).append(Visit(*counts, tuple(told)))

    return replace(cell, watch=watch), visits


def test_a_rejection_ends_the_run_and_positions_before_it_have_what_is_left_of_it() -> None:
    run, match, features = answers.positions([Visit(4, 5, 3, 5, (0.5,)), Visit(1, 0, 0, 0, (0,))])
    assert run.tolist() == [0, 3, 2, 1, 0, 0]
    assert (match > 0).tolist() == [False, True, True, True, True, False]
    assert features[0].tolist() == [0, 0.5, 0.5, 0.5, 0.5, 0]


def test_a_run_goes_on_where_all_was_accepted_and_the_next_step_has_one() -> None:
    ends, goes_on = Visit(1, 0, 0, 0, ()), Visit(3, 4, 2, 4, ())
    whole, held_back = Visit(3, 2, 2, 5, ()), Visit(1, 0, 0, 5, ())
    assert answers.positions([whole, ends])[0].tolist() == [0, 2, 1, 0, 0]
    assert answers.positions([whole, goes_on])[0].tolist() == [0, 5, 4, 3, 2, 1, 0]
    assert answers.positions([held_back, goes_on])[0].tolist() == [0, 3, 2, 1, 0]
    assert answers.positions([ends, goes_on])[0].tolist() == [0, 0, 2, 1, 0]


def test_an_engine_recorded_at_its_longest_is_served_alike_from_what_it_reported() -> None:
    cell = LOOKUP.cell(0.5, seed=1)
    noted, visits = watched(cell)
    real = simulate("static5", noted).served
    seen = Observed(_hello("e", cell), visits=visits)
    ids = range(1, cell.traffic.size + 1)
    told = answers.outcomes(seen, ids, cell.traffic.num_output, max_length=5)
    again = simulate("static5", replace(cell, outcomes=told)).served
    assert again.latency_s == pytest.approx(real.latency_s)
    for policy in ("none", "static3"):
        ours = simulate(policy, replace(cell, outcomes=told)).served.latency_s.mean()
        assert ours == pytest.approx(simulate(policy, cell).served.latency_s.mean(), rel=0.03)


def test_the_simulated_engine_tells_what_was_told_at_the_position() -> None:
    cell = LOOKUP.cell(0.5, seed=1)
    outcomes = replace(
        cell.outcomes,
        feature_names=(FEATURE_MATCH_AGREEMENT,),
        features=np.arange(len(cell.outcomes.run), dtype=np.float32)[None],
    )
    cell = replace(cell, outcomes=outcomes)
    assert _hello("e", cell).limits.features == (FEATURE_LAST_SHARE, FEATURE_MATCH_AGREEMENT)
    seen: list[float] = []

    class Reading(FixedLength):
        def choose(self, batch: DecodeBatch) -> Choice:
            seen.extend(batch.features[1].tolist())
            return super().choose(batch)

    serve(Reading(0), cell)
    offset, num_output = outcomes.offset, cell.traffic.num_output
    wanted = [o + p for o, n in zip(offset, num_output, strict=True) for p in range(1, n)]
    assert sorted(seen) == sorted(wanted)


@pytest.fixture
def recording(tmp_path: Path) -> tuple[Path, dict[int, list[Visit]]]:
    """Of a lookup engine under SmartSpec; and what its steps did."""
    cell, visits = watched(LOOKUP.cell(0.5, seed=1))
    fleet = Fleet([cell])
    writer = Writer(tmp_path / "a.rec", 0.0)
    receive = fleet._wire.receive

    def listening() -> tuple[bytes, bytes] | None:
        got = receive()
        if got is not None:
            at_s = fleet._queue.now_s
            writer.add(FrameEvent(turn=0, at_s=at_s, peer=got[0], inbound=True, frame=got[1]))
        return got

    fleet._wire.receive = listening  # type: ignore[method-assign]
    fleet.run()
    writer.close()
    return tmp_path / "a.rec", visits


def test_visits_are_read_from_a_recording_where_asked_for(
    recording: tuple[Path, dict[int, list[Visit]]],
) -> None:
    path, visits = recording
    assert observed.of_recording(path, with_visits=True)["engine-0"].visits == visits
    without = observed.of_recording(path)["engine-0"]
    with pytest.raises(ValueError, match="with_visits"):
        answers.outcomes(without, [1], np.array([5]), max_length=5)


def test_a_request_that_was_not_seen_has_no_drafts() -> None:
    seen = Observed(_hello("e", LOOKUP.cell(0.5, seed=1)), visits={1: [Visit(2, 5, 1, 5, (0, 4))]})
    told = answers.outcomes(seen, [1, 2], np.array([5, 4]), max_length=2)
    assert told.offset.tolist() == [0, 7]
    assert told.run[:5].tolist() == [0, 1, 0, 0, 1]  # repeated: it is shorter than wanted
    assert told.match_length is not None
    assert not told.run[7:].any() and not told.match_length[7:].any()
