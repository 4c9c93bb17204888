"""Recorded drafts: read from an engine's own reports, or from traces, and played again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from smartspec.daemon import config
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
from smartspec.engine_adapter.simulator.recorded import Answer, Recorded
from smartspec.lab.profiles import answers, observed
from smartspec.lab.profiles.observed import Observed, Visit
from smartspec.lab.simulation.workload import Workload
from smartspec.lab.simulation.world import Cell, Fleet, _hello, serve, simulate

TRACES = Path(__file__).parents[2] / "benchmarks" / "data" / "acceptance.npz"
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
    visits = [Visit(4, 5, 3, 5, (0.5,)), Visit(1, 0, 0, 0, (0,))]
    run, match, features = answers.positions(visits, num_features=1)
    assert run.tolist() == [0, 3, 2, 1, 0, 0]
    assert (match > 0).tolist() == [False, True, True, True, True, False]
    assert features[0].tolist() == [0, 0.5, 0.5, 0.5, 0.5, 0]


def test_a_run_goes_on_where_all_was_accepted_and_the_next_step_has_one() -> None:
    ends, goes_on = Visit(1, 0, 0, 0, ()), Visit(3, 4, 2, 4, ())
    whole, held_back = Visit(3, 2, 2, 5, ()), Visit(1, 0, 0, 5, ())
    for visits, run in (
        ([whole, ends], [0, 2, 1, 0, 0]),
        ([whole, goes_on], [0, 5, 4, 3, 2, 1, 0]),
        ([held_back, goes_on], [0, 3, 2, 1, 0]),
        ([ends, goes_on], [0, 0, 2, 1, 0]),
    ):
        assert answers.positions(visits, num_features=0).run.tolist() == run


def test_an_engine_recorded_at_its_longest_is_served_alike_from_what_it_reported() -> None:
    cell = LOOKUP.cell(0.5, seed=1)
    noted, visits = watched(cell)
    real = simulate("static5", noted).served
    seen = Observed(_hello("e", cell), visits=visits)
    size, num_output = cell.traffic.size, cell.traffic.num_output
    recorded = answers.of_visits(seen, range(1, size + 1))
    told = recorded.outcomes(range(size), num_output, max_length=5)
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


def record(
    path: Path, cell: Cell, mode: str = "control", keep: Callable[[int], bool] = lambda frame: True
) -> Path:
    """Write what an engine says: under SmartSpec, or, observed, at its own length of 3."""
    fleet = Fleet([cell], settings=config.load(None, {}, {"mode": mode}))
    writer, num_frames = Writer(path, 0.0), 0
    receive = fleet._wire.receive

    def listening() -> tuple[bytes, bytes] | None:
        nonlocal num_frames
        got = receive()
        if got is not None:
            num_frames += 1
            at_s = fleet._queue.now_s
            if keep(num_frames):
                writer.add(FrameEvent(turn=0, at_s=at_s, peer=got[0], inbound=True, frame=got[1]))
        return got

    fleet._wire.receive = listening  # type: ignore[method-assign]
    fleet.run()
    writer.close()
    return path


SHORT = msgspec.structs.replace(LOOKUP, max_length=3)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a lookup engine that drafts its longest, 3."""
    return record(tmp_path_factory.mktemp("rec") / "a.rec", SHORT.cell(0.5, seed=1), "observe")


def test_visits_are_read_from_a_recording_where_asked_for(tmp_path: Path) -> None:
    cell, visits = watched(LOOKUP.cell(0.5, seed=1))
    path = record(tmp_path / "a.rec", cell)
    assert observed.of_recording(path, with_visits=True)["engine-0"].visits == visits
    without = observed.of_recording(path)["engine-0"]
    with pytest.raises(ValueError, match="with_visits"):
        answers.of_visits(without, [1])


def test_a_request_that_was_not_seen_has_no_drafts() -> None:
    seen = Observed(_hello("e", LOOKUP.cell(0.5, seed=1)), visits={1: [Visit(2, 5, 1, 5, (0, 4))]})
    recorded = answers.of_visits(seen, [1, 2])
    told = recorded.outcomes([0, 1], np.array([5, 4]), max_length=2)
    assert told.offset.tolist() == [0, 7]
    assert told.run[:5].tolist() == [0, 1, 0, 1, 0]  # repeated: it is shorter than wanted
    assert told.features is not None and told.features[0, :5].tolist() == [0, 4, 4, 4, 4]
    assert told.match_length is not None
    assert not told.run[7:].any() and not told.match_length[7:].any()


# -- files --------------------------------------------------------------------------------------


def test_whole_answers_of_a_recording_are_loaded(recording: Path) -> None:
    decoded = [size for size in SHORT.cell(0.5, seed=1).traffic.num_output.tolist() if size > 1]
    loaded = answers.load(recording, is_lookup=True, max_length=3)
    # All but the last that was there: whether it went on is not known.
    assert len(loaded.answers) == len(decoded) - 1
    for size in loaded.sizes.tolist():
        decoded.remove(size)
    assert loaded.feature_names == ("match_length",)


def test_answers_that_were_cut_by_a_gap_are_left_out(tmp_path: Path, recording: Path) -> None:
    whole = answers.load(recording, is_lookup=True, max_length=3)
    cell = SHORT.cell(0.5, seed=1)
    path = record(tmp_path / "a.rec", cell, "observe", keep=lambda frame: frame != 100)
    cut = answers.load(path, is_lookup=True, max_length=3)
    assert 0 < len(cut.answers) < len(whole.answers)
    known = cell.traffic.num_output.tolist()
    assert all(size in known for size in cut.sizes.tolist())


def test_a_recording_that_leaves_open_what_longer_drafts_would_bring_is_refused(
    tmp_path: Path,
) -> None:
    cell = msgspec.structs.replace(LOOKUP, acceptance=0.8).cell(0.5, seed=1)
    path = record(tmp_path / "a.rec", cell, "observe")
    with pytest.raises(ValueError, match=r"at \d\d% of the steps .* what 5 would have brought"):
        answers.load(path, is_lookup=True, max_length=5)
    assert answers.load(path, is_lookup=True, max_length=3).answers


def test_files_that_cannot_serve_are_refused_with_the_reason(
    tmp_path: Path, recording: Path
) -> None:
    (tmp_path / "text.rec").write_text("nothing")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "sizes.npz", num_positions=np.array([4]), draft_run=np.zeros(3))
    np.savez(tmp_path / "empty.npz", num_positions=np.zeros(0, int), draft_run=np.zeros(0))
    for name, is_lookup, max_length, words in (
        (tmp_path / "empty.npz", False, None, "no answers in it"),
        (tmp_path / "none.rec", True, 3, "No such file"),
        (tmp_path / "text.rec", True, 3, "not a recording .* nor traces"),
        (tmp_path / "other.npz", True, 3, "not traces of drafts: .*num_positions"),
        (tmp_path / "sizes.npz", False, 3, "columns differ in size"),
        (recording, False, 3, "its drafts are lookups, and `draft` asks for a draft model's"),
        (recording, True, 4, "drafts at most 3; max_length: 4"),
        (TRACES, True, 9, "recorded up to 8; max_length: 9"),
    ):
        with pytest.raises(ValueError, match=words) as refused:
            answers.load(name, is_lookup=is_lookup, max_length=max_length)
        assert name.name in str(refused.value)


def test_trees_and_engines_that_draft_nothing_are_refused(tmp_path: Path) -> None:
    trees = Workload(profile="h100_8b", draft="eagle", trees=True, duration_s=1.0, mean_output=20)
    record(tmp_path / "trees.rec", trees.cell(0.5, seed=1), "observe")
    with pytest.raises(ValueError, match="drafts trees, and only chains"):
        answers.load(tmp_path / "trees.rec", is_lookup=False, max_length=3)
    cell = SHORT.cell(0.3, seed=1)
    assert cell.outcomes.match_length is not None
    never = replace(cell.outcomes, match_length=np.zeros_like(cell.outcomes.match_length))
    record(tmp_path / "none.rec", replace(cell, outcomes=never), "observe")
    with pytest.raises(ValueError, match="nothing could be drafted"):
        answers.load(tmp_path / "none.rec", is_lookup=True, max_length=3)


def test_traces_hold_lookups_and_a_draft_model(tmp_path: Path) -> None:
    columns = {
        "num_positions": np.array([2, 3]),
        "lookup_run": np.array([1, 0, 2, 1, 0]),
        "match_length": np.array([3, 0, 2, 2, 0]),
        "match_agreement": np.array([0.5, 0, 1, 1, 0]),
        "draft_run": np.array([0, 1, 0, 2, 1]),
    }
    np.savez(tmp_path / "t.npz", **columns)
    lookup = answers.load(tmp_path / "t.npz", is_lookup=True, max_length=2)
    assert [answer.run.tolist() for answer in lookup.answers] == [[0, 1, 0], [0, 2, 1, 0]]
    assert lookup.answers[1].match.tolist() == [0, 2, 2, 0]
    assert lookup.feature_names == ("match_length", "match_agreement")
    assert lookup.answers[0].features.tolist() == [[0, 3, 0], [0, 0.5, 0]]
    model = answers.load(tmp_path / "t.npz", is_lookup=False, max_length=2)
    assert [answer.run.tolist() for answer in model.answers] == [[0, 0, 1], [0, 0, 2, 1]]
    assert all(answer.match[1:].all() for answer in model.answers)
    assert model.feature_names == ()


# -- which of them a request has ----------------------------------------------------------------


def answer_of(*run: int) -> Answer:
    column = np.array([0, *run], np.uint8)
    return Answer(column, np.sign(column), np.empty((0, len(column)), np.float32))


def test_a_request_has_the_drafts_of_an_answer_of_the_nearest_length() -> None:
    recorded = Recorded([answer_of(*[1] * n) for n in (9, 29, 29, 49)])
    lengths = np.array([1, 19, 21, 30, 45, 900] * 50)
    nearest = recorded.nearest(lengths, seed=3)
    of_length: dict[int, set[int]] = {}
    for length, which in zip(lengths.tolist(), nearest, strict=True):
        of_length.setdefault(length, set()).add(which)
    # 30 is as near to both of 30; 20 would be as near to 10.
    assert of_length == {1: {0}, 19: {0}, 21: {1, 2}, 30: {1, 2}, 45: {3}, 900: {3}}
    assert recorded.nearest(lengths, seed=3) == nearest
    assert recorded.nearest(lengths, seed=4) != nearest
    part = recorded.nearest(lengths[:7], seed=3)
    assert part == nearest[:7]  # whoever comes after


def test_nobody_gets_its_own_where_that_is_to_be_so() -> None:
    recorded = Recorded([answer_of(*[1] * n) for n in (9, 11, 49)])
    assert recorded.nearest(recorded.sizes, 0, own=np.arange(3)) == [1, 0, 1]


def test_what_drafting_at_every_step_brings_is_counted() -> None:
    # Drafts of up to 2 at positions 1 (both right), 4 (one right, two to be had), 6 (none there).
    answer = Answer(
        np.array([0, 4, 3, 2, 1, 0, 0, 0], np.uint8),
        np.array([0, 1, 1, 1, 1, 1, 0, 1], np.uint8),
        np.empty((0, 8), np.float32),
    )
    tried = Recorded([answer]).tried(2)
    assert (tried.accepted.tolist(), tried.tried.tolist()) == ([3], [4])
    assert (tried.num_steps, tried.num_with_drafts) == (4, 3)


def test_runs_with_recorded_drafts_repeat_bit_for_bit_and_differ_by_seed() -> None:
    workload = Workload(
        profile="a100_7b", draft="lookup", drafts=str(TRACES), duration_s=4.0, mean_output=80
    )
    assert isinstance(workload.recorded_drafts(), Recorded)
    first, again, other = (workload.cell(0.4, seed) for seed in (1, 1, 2))
    assert first.outcomes.run.tobytes() == again.outcomes.run.tobytes()
    assert first.outcomes.run.tobytes() != other.outcomes.run.tobytes()
    for policy in ("static3", "smartspec"):
        served = [simulate(policy, cell).served.finished_s.tobytes() for cell in (first, again)]
        assert served[0] == served[1], policy
