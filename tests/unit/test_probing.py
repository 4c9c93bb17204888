"""Probes: paid from a budget, silent while requests wait; the first sweep comes to an end."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from fakes import Steering, step_facts
from scripted_engine import Costs, ScriptedEngine, hello

from smartspec.daemon.engines import Engine
from smartspec.daemon.planner import Planner
from smartspec.daemon.probing import (
    LOOKS,
    MAX_TRIES,
    PROBE_TOKENS,
    SAVINGS_S,
    SHARE_WHILE_DRAFTING,
    SHARE_WHILE_OFF,
    sweep_lengths,
)
from smartspec.engine_adapter.base import DecodeBatch

BUSY = Costs(base_s=0.004, token_s=0.002, noise=0.0)
CHEAP = Costs(base_s=0.03, token_s=0.0005, noise=0.0)
DRAFTING = Costs(base_s=0.03, token_s=0.001, draft_forward_s=0.03, draft_token_s=1e-4, noise=0.0)


def steered(
    acceptance: Any,
    costs: Costs = BUSY,
    *,
    lookup: bool = True,
    share: float = 0.005,
    sweep: bool = True,
    max_length: int = 5,
    late: int = 0,
    of: type[ScriptedEngine] = ScriptedEngine,
    **more: Any,
) -> tuple[Any, Steering]:
    greeting = hello(lookup=lookup, max_length=max_length, static_length=min(3, max_length))
    engine = Engine(greeting)
    planner = Planner(engine, daemon_epoch=1, probe_share=share, seed_sweep=sweep)
    source = Steering(engine, planner, late=late)
    scripted = of(source, np.array(acceptance), costs, max_length, lookup=lookup, **more)
    return scripted, source


def sweep_through(engine: ScriptedEngine, source: Steering) -> None:
    """Run to the sweep's end; it has one."""
    for _ in range(100):
        if not source.planner.prober.sweeping:
            return
        engine.step()
    pytest.fail("the sweep goes on")


def expected_goodput(engine: ScriptedEngine, skip: int) -> float:
    """Tokens per second of the steps after ``skip``, chance taken out of acceptance and time."""
    tokens = seconds = 0.0
    c = engine.costs
    for choice in engine.choices[skip:]:
        for k, a in zip(choice.lengths.tolist(), engine.acceptance.tolist(), strict=True):
            tokens += sum(a**j for j in range(k + 1))
        drafts = int(choice.lengths.sum())
        seconds += c.base_s + c.token_s * (len(engine.acceptance) + drafts)
        if not engine.lookup:
            depth = int(choice.lengths.max())
            seconds += c.draft_forward_s * depth + c.draft_token_s * drafts
    return tokens / seconds


@pytest.mark.parametrize("lookup", [True, False], ids=["lookup", "draft_model"])
def test_probing_costs_no_more_than_its_share_of_goodput(lookup: bool) -> None:
    costs = BUSY if lookup else DRAFTING
    rng = np.random.default_rng(2)
    acceptance = rng.uniform(0.1, 0.6, 12)
    engines = {}
    for share in (0.0, 0.005):
        engine, source = steered(acceptance, costs, lookup=lookup, share=share)
        for _ in range(800):
            engine.step()
        engines[share] = engine
        prober = source.planner.prober
        assert prober.cost_s <= share * engine.seconds
        assert (prober.num_probes > 0) == (share > 0)
    with_probes, without = (expected_goodput(engines[share], 300) for share in (0.005, 0.0))
    assert with_probes >= 0.985 * without


def test_probes_are_few_when_the_budget_is_small() -> None:
    counts = []
    for share in (0.0005, 0.02):
        engine, source = steered([0.1] * 8, share=share)
        for _ in range(400):
            engine.step()
        assert source.planner.prober.cost_s <= share * engine.seconds
        counts.append(source.planner.prober.num_probes)
    assert counts[0] < counts[1]


@pytest.mark.parametrize("sweep", [True, False])
def test_nothing_is_probed_while_requests_wait(sweep: bool) -> None:
    engine, source = steered([0.3] * 6, sweep=sweep, share=0.05)
    engine.num_waiting = 4
    for _ in range(100):
        engine.step()
    assert all(d.policy.num_probes == 0 for d in source.decisions)
    engine.num_waiting = 0
    for _ in range(100):
        engine.step()
    assert any(d.policy.num_probes > 0 for d in source.decisions)


@pytest.mark.parametrize(
    ("acceptance", "lookup", "match_rate"),
    list(itertools.product((0.1, 0.95), (True, False), (1.0, 0.3))),
)
def test_sweep_ends_soon_when_there_is_something_to_draft(
    acceptance: float, lookup: bool, match_rate: float
) -> None:
    engine, source = steered([acceptance] * 3, lookup=lookup, match_rate=match_rate, share=0.0)
    for _ in range(100):
        engine.step()
    assert not source.planner.prober.sweeping
    assert all(d.policy.num_probes == 0 for d in source.decisions[-10:])


def test_sweep_ends_when_a_lookup_never_matches() -> None:
    engine, source = steered([0.5] * 3, match_rate=0.0, max_length=2, share=0.0)
    for _ in range(len(sweep_lengths(2)) * MAX_TRIES + 10):
        engine.step()
    assert not source.planner.prober.sweeping


def test_sweep_tries_all_its_lengths_though_no_draft_is_accepted() -> None:
    engine, source = steered([0.05] * 4, lookup=False, costs=DRAFTING, share=0.0)
    tried = set()
    for _ in range(60):
        tried |= set(engine.step().num_drafted.tolist())
    assert tried >= set(sweep_lengths(5))
    assert not source.planner.prober.sweeping


@pytest.mark.parametrize("late", [0, 1, 3])
def test_sweep_goes_on_while_policies_are_on_their_way(late: int) -> None:
    costs = Costs(base_s=0.004, token_s=0.02, noise=0.0)  # nothing but 0 is worth a second look
    engine, source = steered([0.3] * 4, costs, max_length=8, share=0.0, late=late)
    started = 1 + late  # steps at the engine's own length, before any policy has arrived
    for _ in range(started + len(sweep_lengths(8)) + 2 * late + LOOKS):
        engine.step()
    assert not source.planner.prober.sweeping
    ran = [int(choice.lengths.max()) for choice in engine.choices[started:]]
    assert ran[: len(sweep_lengths(8))] == sweep_lengths(8)
    assert ran.count(8) == 1  # which is the dearest to run again


def test_sweep_tries_lengths_near_the_best_again_and_no_others() -> None:
    costs = Costs(base_s=0.02, token_s=0.002, noise=0.0)
    engine, source = steered([0.6] * 4, costs, max_length=8, share=0.0)
    sweep_through(engine, source)
    ran = [int(choice.lengths.max()) for choice in engine.choices]
    assert ran.count(3) > LOOKS  # which the engine ran of its own accord once
    assert ran.count(8) == 1


def test_sweep_tries_the_best_lengths_again_when_a_lookup_often_finds_nothing() -> None:
    costs = Costs(base_s=0.02, token_s=0.001, noise=0.0)  # were all drafts there, 8 would be dear
    engine, source = steered([0.9] * 8, costs, max_length=8, match_rate=0.25, share=0.0)
    sweep_through(engine, source)
    tried = [d.policy.depth for d in source.decisions if d.order.is_sweep]
    assert source.decisions[-1].lengths.max() == 8
    assert tried.count(8) > LOOKS


class Capped(ScriptedEngine):
    """Its requests have less room than the engine's longest length."""

    cap = 3

    def batch(self) -> DecodeBatch:
        batch = super().batch()
        return dataclasses.replace(batch, ceiling=np.minimum(batch.ceiling, self.cap))


def test_sweep_takes_no_steps_for_lengths_that_no_request_can_have() -> None:
    engine, source = steered([0.05] * 4, DRAFTING, lookup=False, max_length=8, share=0.0, of=Capped)
    for _ in range(40):
        engine.step()
    tried = [d.policy.depth for d in source.decisions if d.order.is_sweep]
    assert tried == [2, 1, 0, 0]  # crossed off once the next decision has been made
    assert not any(choice.lengths.any() for choice in engine.choices[-30:])
    for _ in range(2 * MAX_TRIES):
        engine.step()
    assert not source.planner.prober.sweeping


def test_sweep_goes_on_when_requests_come_that_can_have_longer_lengths() -> None:
    engine, source = steered([0.05] * 4, DRAFTING, lookup=False, max_length=8, share=0.0, of=Capped)
    for _ in range(MAX_TRIES // 2):
        engine.step()
    engine.cap = 8
    for _ in range(5):
        engine.step()
    tried = [d.policy.depth for d in source.decisions if d.order.is_sweep]
    assert tried[:6] == [2, 1, 0, 0, 8, 4]


def test_no_sweep_is_made_when_it_is_not_wanted_or_the_engine_is_warm() -> None:
    engine, source = steered([0.05] * 4, sweep=False, share=0.0)
    for _ in range(150):
        engine.step()
    assert all(d.policy.num_probes == 0 for d in source.decisions)
    restarted = Engine(hello(epoch=2), source.engine)
    assert not Planner(restarted, daemon_epoch=1).prober.sweeping


@pytest.mark.parametrize("lookup", [True, False], ids=["lookup", "draft_model"])
def test_half_the_budget_goes_into_small_probes_while_nothing_is_drafted(lookup: bool) -> None:
    share, costs = 0.02, BUSY if lookup else DRAFTING
    engine, source = steered([0.05] * 12, costs, lookup=lookup, share=share)
    prober = source.planner.prober
    for _ in range(200):
        engine.step()
    before, cost_s, seconds = len(engine.choices), prober.cost_s, engine.seconds
    for _ in range(800):
        engine.step()
    drafted = [c for c in engine.choices[before:] if c.lengths.any()]
    assert {choice.source for choice in drafted} == {"probe"}
    assert all(choice.lengths.sum() <= PROBE_TOKENS for choice in drafted)
    earned_s = SHARE_WHILE_OFF * share * (engine.seconds - seconds)
    assert 0.7 * earned_s < prober.cost_s - cost_s < 1.3 * earned_s


def test_probe_is_paid_at_what_it_brought() -> None:
    costs = []
    for acceptance in (0.0, 1.0):
        engine, source = steered([0.3] * 8, share=0.1)
        for _ in range(300):
            engine.step()
        engine.acceptance = np.full(8, acceptance)
        while engine.choices[-1].source != "probe":
            engine.step()
        costs.append(source.planner.prober.cost_s)
        num_drafts = int(engine.choices[-1].lengths.sum())
        value_of_time = source.decisions[-1].policy.value_of_time
    assert costs[0] - costs[1] == pytest.approx(num_drafts / value_of_time, rel=0.05)


def test_forward_that_follows_a_probe_is_paid_for() -> None:
    """But not one whose drafts were all cut: that was run for what they might have been worth."""
    costs = []
    for num_draft_forwards, num_cut in ((0, 0), (1, 0), (1, 1)):
        engine, source = steered([0.1] * 4, DRAFTING, lookup=False, share=0.0, sweep=False)
        for _ in range(50):
            engine.step()
        assert not engine.choices[-1].lengths.any()
        batch = engine.batch()
        more: dict[str, Any] = {"num_draft_forwards": num_draft_forwards, "num_draft_tokens": 0}
        if num_cut:
            more["num_cut"] = np.full(batch.size, num_cut, np.uint8)
            more["num_cut_accepted"] = np.zeros(batch.size, np.uint8)
        facts = step_facts(batch, draft_s=0.03 * num_draft_forwards, step_s=0.07, **more)
        before = source.planner.prober.cost_s
        source.report(facts)
        costs.append(source.planner.prober.cost_s - before)
    assert costs[0] == costs[2] == 0.0
    assert costs[1] == pytest.approx(DRAFTING.draft_forward_s, rel=0.15)


def test_no_report_takes_more_from_the_budget_than_its_step_took() -> None:
    engine, source = steered([0.1] * 4, DRAFTING, lookup=False, share=0.01, sweep=False)
    for _ in range(50):
        engine.step()
    prober, before = source.planner.prober, source.planner.prober.cost_s
    # It claims more forwards than any step has: what it pays for them must be earned back some day.
    source.report(step_facts(engine.batch(), step_s=0.07, num_draft_forwards=1 << 28))
    assert prober.cost_s - before == pytest.approx(0.07)
    probes = prober.num_probes
    for _ in range(800):
        engine.step()
    assert prober.num_probes > probes


@pytest.mark.parametrize("lookup", [True, False], ids=["lookup", "draft_model"])
def test_way_back_is_found_when_acceptance_rises_after_speculation_was_off(lookup: bool) -> None:
    forward_s = 0.0 if lookup else 0.002
    costs = Costs(0.012, 0.002, draft_forward_s=forward_s, noise=0.0)
    engine, _ = steered([0.02] * 8, costs, lookup=lookup)
    for _ in range(300):
        engine.step()
    assert max(int(c.lengths.max()) for c in engine.choices[-40:] if c.source == "policy") == 0
    engine.acceptance = np.full(8, 0.95)
    for _ in range(1500):
        engine.step()
        if engine.choices[-1].lengths.mean() > 2.5:
            break
    else:
        pytest.fail("speculation stays off though drafts are accepted")


def test_engine_that_cannot_speculate_is_left_alone() -> None:
    engine = Engine(hello(max_length=0, static_length=0))
    source = Steering(engine, Planner(engine, daemon_epoch=1), own_length=0)
    scripted = ScriptedEngine(source, np.array([0.5]), max_length=0)
    for _ in range(20):
        scripted.step()
    assert source.decisions == []


def test_what_was_saved_is_not_spent_in_a_burst_when_drafting_begins_again() -> None:
    engine, source = steered([0.95] * 6, CHEAP, share=0.02, sweep=False)
    prober = source.planner.prober
    prober._settling = 0
    prober._purse_s = 0.02 * SAVINGS_S  # saved at length 0, with nothing worth a probe
    for _ in range(20):
        engine.step()
    assert engine.choices[-1].lengths.any()
    assert 0 < prober._purse_s <= SHARE_WHILE_DRAFTING * 0.02 * SAVINGS_S
