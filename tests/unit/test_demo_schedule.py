"""The demonstration's schedule: fair, repeatable, and as loaded as it says."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from smartspec.lab.demo import schedule
from smartspec.lab.demo.schedule import BUSY_LOAD, QUIET_LOAD, Prompt, build, load_prompts, mixed


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return load_prompts()


def test_prompts_are_of_many_kinds_when_loaded(prompts: list[Prompt]) -> None:
    assert len(prompts) >= 60
    assert len({prompt.kind for prompt in prompts}) >= 6
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    assert len({prompt.prompt for prompt in prompts}) == len(prompts)
    assert all(prompt.max_tokens > 0 and prompt.prompt.strip() for prompt in prompts)


def test_schedule_is_the_same_when_built_twice(prompts: list[Prompt]) -> None:
    assert build(prompts, 2.0, seed=7) == build(prompts, 2.0, seed=7)
    assert build(prompts, 2.0, seed=7) != build(prompts, 2.0, seed=8)


@pytest.mark.parametrize("capacity", [0.3, 1.0, 2.5, 6.0, 200.0])
def test_every_prompt_arrives_once_and_in_its_phase_when_built(
    prompts: list[Prompt], capacity: float
) -> None:
    built = build(prompts, capacity, seed=3)
    arrivals = built.arrivals
    assert Counter(a.prompt.id for a in arrivals) == Counter(p.id for p in prompts)
    assert [a.at_s for a in arrivals] == sorted(a.at_s for a in arrivals)
    for phase in built.phases:
        members = [a for a in arrivals if a.phase == phase.name]
        assert all(phase.begin_s <= a.at_s <= phase.end_s for a in members)
        rate = len(members) / (phase.end_s - phase.begin_s)
        assert rate == pytest.approx(phase.requests_per_s)
        load = BUSY_LOAD if phase.name == "busy" else QUIET_LOAD
        assert rate == pytest.approx(load * capacity)


def test_duration_meets_the_target_when_the_machine_allows_it(prompts: list[Prompt]) -> None:
    durations = [build(prompts, c, seed=0).duration_s for c in (2.0, 2.5, 3.0)]
    assert durations == pytest.approx([schedule.TARGET_S] * 3, rel=0.25)


def test_phases_hold_all_kinds_when_prompts_are_mixed(prompts: list[Prompt]) -> None:
    kinds = {prompt.kind for prompt in prompts}
    for seed in range(20):
        built = build(prompts, 2.5, seed)
        for phase in built.phases:
            counts = Counter(a.prompt.kind for a in built.arrivals if a.phase == phase.name)
            fair = sum(counts.values()) / len(kinds)
            assert all(abs(counts[kind] - fair) <= 2 for kind in kinds)


def test_phase_is_the_last_one_when_the_schedule_is_over(prompts: list[Prompt]) -> None:
    built = build(prompts, 2.5, seed=0)
    assert [built.phase_at(p.begin_s) for p in built.phases] == [p.name for p in built.phases]
    assert built.phase_at(built.duration_s + 100) == built.phases[-1].name


@pytest.mark.parametrize("capacity", [0.0, -1.0, math.nan, math.inf])
def test_schedule_is_refused_when_capacity_is_no_rate(
    prompts: list[Prompt], capacity: float
) -> None:
    with pytest.raises(ValueError, match="capacity"):
        build(prompts, capacity, seed=0)


def test_schedule_is_refused_when_prompts_are_too_few(prompts: list[Prompt]) -> None:
    with pytest.raises(ValueError, match="at least 3"):
        build(prompts[:2], 1.0, seed=0)


def test_short_schedule_holds_all_kinds_when_asked_for(prompts: list[Prompt]) -> None:
    short = schedule.shortened(prompts, 16, 24)
    assert len(short) == 16
    assert {prompt.kind for prompt in short} == {prompt.kind for prompt in prompts}
    assert max(prompt.max_tokens for prompt in short) <= 24


def test_mixed_loses_nothing_when_kinds_are_uneven() -> None:
    import numpy as np

    uneven = [
        Prompt(f"{kind}{i}", kind, "x", 5) for kind, n in (("a", 5), ("b", 1)) for i in range(n)
    ]
    assert sorted(p.id for p in mixed(uneven, np.random.default_rng(0))) == sorted(
        p.id for p in uneven
    )
