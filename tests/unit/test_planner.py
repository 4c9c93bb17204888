"""From estimates to a policy: that the engine runs it as meant, and that the reason says why."""

from __future__ import annotations

import dataclasses
from itertools import groupby, pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from fakes import Steering, decode_batch, step_report
from scripted_engine import CopyingEngine, Costs, ScriptedEngine, hello

from smartspec.daemon.decision import Arm, Decision
from smartspec.daemon.engines import Engine
from smartspec.daemon.outlook import Outlook
from smartspec.daemon.planner import YOUNG, Planner
from smartspec.daemon.told import LATE_STEPS, TOLD_EVERY
from smartspec.engine_adapter import messages as wire
from smartspec.engine_adapter.lengths import RAGGED, UNIFORM
from smartspec.engine_adapter.program import Program
from smartspec.estimators.step_cost import StepShape


def planned(
    acceptance: Any,
    costs: Costs | None = None,
    steps: int = 200,
    *,
    meet_targets: bool = True,
    modes: tuple[str, ...] = (RAGGED,),
    **more: Any,
) -> tuple[ScriptedEngine, Steering]:
    """An engine after some steps under its planner, without probes."""
    lookup = more.get("lookup", True)
    engine = Engine(hello(lookup=lookup, modes=modes))
    planner = Planner(
        engine, daemon_epoch=9, probe_share=0.0, seed_sweep=True, meet_targets=meet_targets
    )
    source = Steering(engine, planner)
    scripted = ScriptedEngine(source, np.array(acceptance), costs or Costs(), **more)
    for _ in range(steps):
        scripted.step()
    return scripted, source


def run_with_prompts(scripted: ScriptedEngine, num_tokens: int) -> None:
    """Steps of which every other carries so many tokens of prompts."""
    for step in range(600):
        scripted.num_prefill_tokens = num_tokens * (step % 2)
        scripted.step()


def decision_for(engine: Engine, **more: Any) -> Decision:
    engine.learn(engine.observe(step_report(engine.last_seq + 1, **more)))
    decision = Planner(engine, daemon_epoch=9, seed_sweep=False, probe_share=0.0).decide()
    assert decision is not None
    return decision


# -- when there is nothing to decide --------------------------------------------------------------


def test_nothing_is_decided_before_the_engine_decodes() -> None:
    engine = Engine(hello())
    planner = Planner(engine, daemon_epoch=9)
    assert planner.decide() is None
    engine.observe(step_report(1, [], num_prefill_tokens=100))
    assert planner.decide() is None


def test_nothing_is_decided_when_the_engine_cannot_speculate() -> None:
    engine = Engine(hello(max_length=0, static_length=0))
    none: dict[str, Any] = {
        "num_drafted": b"",
        "num_accepted": b"",
        "num_emitted": b"",
        "num_available": b"",
    }
    engine.observe(step_report(1, **none))
    assert Planner(engine, daemon_epoch=9).decide() is None


def confident(confidences: bool = True) -> Engine:
    new = hello()
    limits = msgspec.structs.replace(new.limits, confidences=confidences)
    return Engine(msgspec.structs.replace(new, limits=limits))


def test_drafts_are_left_to_confidences_when_the_engine_has_them() -> None:
    policy = decision_for(confident()).policy
    assert policy.by_confidence and policy.depth == policy.max_length
    assert "as many drafts as their confidences pay for" in policy.reason
    assert not decision_for(confident(False)).policy.by_confidence


def test_drafts_are_not_left_to_confidences_when_something_else_must_bind() -> None:
    target = wire.pack([0.5, 0.0, 0.0], "f32")
    wants = wire.Roster(version=1, request_ids=wire.pack((1, 2, 3), "u64"))
    wants = msgspec.structs.replace(wants, token_time_target_s=target)
    assert not decision_for(confident(), roster=wants).policy.by_confidence
    engine = confident()
    engine.learn(engine.observe(step_report(1)))
    settings: dict[str, Any] = {"daemon_epoch": 9, "probe_share": 0.0}
    sweeping = Planner(engine, seed_sweep=True, **settings).decide()
    assert sweeping is not None and not sweeping.policy.by_confidence
    none = Planner(engine, seed_sweep=False, **settings).decide(Arm.NONE)
    assert none is not None and none.policy.depth == 0 and not none.policy.by_confidence


def test_policy_on_confidences_is_sent_again_when_the_value_of_time_has_moved() -> None:
    engine = confident()
    planner = Planner(engine, daemon_epoch=9, seed_sweep=False, probe_share=0.0)

    def decide(seq: int, step_s: float) -> Decision:
        observation = engine.observe(
            step_report(
                seq,
                roster=seq == 1,
                step_s=step_s,
                target_s=step_s,
                draft_s=0.0,
                policy_seq=engine.policy_seq,
            )
        )
        decision = planner.decide()
        engine.learn(observation)
        assert decision is not None
        return decision

    quick = [decide(seq, 0.03) for seq in range(1, 60)]
    news = [decision.is_news for decision in quick]
    assert news[0] and sum(news[20:]) <= 3  # once in a while it is told again
    slower = [decide(seq, 0.05) for seq in range(60, 120)]
    told = [d.policy.value_of_time for d in slower if d.is_news]
    assert told and told[-1] < 0.8 * quick[-1].policy.value_of_time


# -- the engine runs what was meant ---------------------------------------------------------------


@pytest.mark.parametrize("lookup", [True, False], ids=["lookup", "draft_model"])
def test_engine_and_daemon_choose_alike_when_nothing_has_changed(lookup: bool) -> None:
    costs = Costs(base_s=0.01, token_s=0.001, draft_forward_s=0.0 if lookup else 0.0005)
    acceptance = [0.95] * 4 + [0.5] * 4 + [0.05] * 4
    scripted, source = planned(acceptance, costs, lookup=lookup)
    decision = source.decisions[-1]
    engine = source.engine
    assert engine.last is not None
    program = Program(decision.policy, engine.hello.limits.features, scripted.ids)
    batch = decode_batch(scripted.ids, num_features=len(engine.hello.limits.features))
    # The features as they were when the step that was reported last was chosen.
    columns = wire.unpack(engine.last.report.features, "f32", batch.features.shape, "features")
    batch.features[:] = columns
    assert program.choose(batch).lengths.tolist() == decision.lengths.tolist()
    assert len(set(decision.lengths.tolist())) > 1


@pytest.mark.parametrize("lookup", [True, False], ids=["lookup", "draft_model"])
def test_value_of_time_is_the_goodput_without_prompts_when_steps_carry_them(lookup: bool) -> None:
    costs = Costs(base_s=0.01, token_s=0.0003, draft_forward_s=0.0 if lookup else 0.0005)
    acceptance = [0.8] * 8

    def decide(num_prefill_tokens: int) -> Decision:
        scripted, source = planned(acceptance, costs, 0, lookup=lookup)
        run_with_prompts(scripted, num_prefill_tokens)
        decision = source.planner.decide()
        assert decision is not None
        return decision

    quiet, busy = decide(0), decide(600)
    assert quiet.policy.value_of_time == pytest.approx(quiet.goodput, rel=1e-4)
    assert quiet.policy.predicted_goodput == quiet.goodput
    assert busy.policy.value_of_time == pytest.approx(quiet.policy.value_of_time, rel=0.1)
    # What is predicted of a step has the last one's prompts in it: 600 tokens, or 180 ms.
    assert busy.policy.predicted_goodput == busy.goodput
    for decision, prompts_s in ((quiet, 0.0), (busy, 0.18)):
        alternatives = ((decision.none.goodput, 0), (decision.static().goodput, 3))
        for goodput, length in alternatives:
            seconds = 0.01 + 0.0003 * 8 * (1 + length) + prompts_s
            seconds += 0.0 if lookup else 0.0005 * length
            tokens = 8 * sum(0.8**j for j in range(length + 1))
            assert goodput == pytest.approx(tokens / seconds, rel=0.15)
        assert goodput * (1 - 1e-6) < decision.goodput < 2 * goodput  # it may be the best


def test_long_drafts_that_keep_prompts_waiting_do_not_compare_as_the_better() -> None:
    costs = Costs(base_s=0.01, token_s=0.001, draft_forward_s=0.0005)
    for num_prefill_tokens in (0, 600):
        scripted, source = planned([0.6] * 8, costs, 0)
        run_with_prompts(scripted, num_prefill_tokens)
        decision = source.planner.decide()
        assert decision is not None and decision.lengths.max() < 3
        chosen, none, own = decision.chosen, decision.none, decision.static()
        compared = decision.compared()
        if not num_prefill_tokens:
            assert decision.prompts == 0.0
            goodput = [one.goodput for one in (chosen, none, own)]
            assert [compared[arm] for arm in (Arm.SMARTSPEC, Arm.NONE, Arm.OWN)] == goodput
        else:  # 600 ms of prompts, at the price of a second
            assert decision.prompts == pytest.approx(0.6 * decision.policy.value_of_time, rel=0.1)
            assert own.goodput > 1.1 * chosen.goodput
        assert compared[Arm.SMARTSPEC] > max(compared[Arm.NONE], compared[Arm.OWN])


@pytest.mark.slow
def test_drafts_are_worth_what_tokens_take_where_they_lead(monkeypatch: pytest.MonkeyPatch) -> None:
    def goodput(seed: int) -> float:
        engine = Engine(hello(max_length=8))
        source = Steering(engine, Planner(engine, daemon_epoch=9, probe_share=0.0))
        copying = CopyingEngine(source, size=8, costs=Costs(0.02, 0.0005), max_length=8, seed=seed)
        for _ in range(2000):
            copying.step()
        worths.append(source.decisions[-1].policy.worth)
        return copying.tokens / copying.seconds

    worths: list[bytes] = []
    found = [goodput(seed) for seed in range(5, 9)]
    monkeypatch.setattr(Planner, "_where", lambda *_: None)
    without = [goodput(seed) for seed in range(5, 9)]
    assert np.mean(found) > 1.002 * np.mean(without)  # 1.001 to 1.01 by seed
    other, *_, copied = np.frombuffer(worths[0], np.float32)
    assert other > 1.3 * copied
    assert worths[-1] == b""


def test_tokens_are_dear_for_the_batch_by_its_requests_weights() -> None:
    engine = Engine(hello(max_length=8))
    source = Steering(engine, Planner(engine, daemon_epoch=9, probe_share=0.0))
    copying = CopyingEngine(source, size=8, costs=Costs(0.02, 0.0005), max_length=8, seed=5)
    for _ in range(300):
        copying.step()
    assert engine.last is not None
    table = np.ascontiguousarray(engine.acceptance.log_survival().T)
    outlook = Outlook.of(engine, engine.last, table)
    pace = outlook.pace(outlook.alone())
    assert pace is not None
    places = engine.learned.continuation.places(np.exp(table), pace)
    assert places is not None
    gains = places.gains[outlook.bucket]
    worths = []
    for weight in (gains.max() + 1 - gains, None, np.full(8, 3.0), gains + 1):
        worth = outlook._replace(weight=weight).among(places).worth
        assert worth is not None
        worths.append(float(worth[0]))
    # With the weight on those that copy tokens come soon, and what is saved elsewhere is many.
    assert worths[0] < 0.98 * worths[1] and worths[3] > 1.02 * worths[2]
    assert worths[1] == pytest.approx(worths[2])


def test_engine_drafts_less_when_its_step_turns_out_to_carry_prompts() -> None:
    # Past 64 tokens each costs twenty times as much: with prompts in the pass, so does a draft.
    costs = Costs(base_s=0.02, token_s=0.0001, knee=64, beyond_s=0.002, noise=0.0)
    scripted, source = planned([0.7] * 8, costs, 0)
    run_with_prompts(scripted, 100)
    decision = source.planner.decide()
    assert decision is not None
    program = Program(decision.policy, source.engine.hello.limits.features, scripted.ids)
    batch = decode_batch(scripted.ids, num_features=2)
    batch.features[:] = [[1.0] * 8, [4.0] * 8]
    without = program.choose(batch).lengths.sum()
    carrying = dataclasses.replace(batch, num_prefill_tokens=100)
    assert program.choose(carrying).lengths.sum() < 0.5 * without


def test_policy_survives_the_wire_for_many_shapes_of_batch() -> None:
    rng = np.random.default_rng(0)
    engine = Engine(hello(max_num_running=64))
    planner = Planner(engine, daemon_epoch=9)
    for seq in range(1, 60):
        size = int(rng.integers(1, 65))
        ids = rng.permutation(1000)[:size]
        weight = wire.pack(rng.uniform(0.1, 9, size), "f32") if seq % 2 else b""
        floor = wire.pack(rng.integers(0, 9, size), "u8") if seq % 3 else b""
        roster = wire.Roster(
            version=seq, request_ids=wire.pack(ids, "u64"), weight=weight, floor=floor
        )
        report = step_report(
            *(seq, ids),
            roster=roster,
            roster_version=seq,
            num_prefill_tokens=int(rng.integers(0, 3000)),
            step_s=10.0,
            num_waiting=int(rng.integers(0, 2)),
        )
        observation = engine.observe(report)
        decision = planner.decide()
        assert decision is not None
        received = wire.decode_daemon_message(wire.encode(decision.policy))
        assert received == decision.policy
        program = Program(decision.policy, engine.hello.limits.features, ids.astype(np.uint64))
        lengths = program.choose(decode_batch(ids)).lengths
        assert lengths.max() <= 5
        engine.learn(observation)


def test_policy_names_the_report_that_it_knew_and_how_long_it_holds() -> None:
    engine = Engine(hello())
    engine.observe(step_report(41, roster_version=3))
    planner = Planner(engine, daemon_epoch=9, ttl_s=2.5, fallback_s=7.0)
    first, second = planner.decide(), planner.decide()
    assert first is not None and second is not None
    policy = first.policy
    assert (policy.report_seq, policy.roster_version) == (41, 3)
    assert (policy.ttl_s, policy.fallback_s) == (2.5, 7.0)
    assert (policy.epoch, policy.daemon_epoch) == (1, 9)
    assert second.policy.seq == policy.seq + 1


# -- when there is nothing new to say -------------------------------------------------------------


@pytest.mark.parametrize("lookup", [True, False], ids=["lookup", "draft_model"])
def test_policy_in_force_is_kept_while_it_does_as_well(lookup: bool) -> None:
    _, source = planned([0.8] * 6 + [0.3] * 6, steps=600, lookup=lookup)
    late = source.decisions[300:]
    kept = [decision for decision in late if not decision.is_news]
    assert len(kept) > len(late) / 2
    for before, after in pairwise(late):
        assert after.policy.seq == before.policy.seq + after.is_news
    in_a_row = max(len(list(run)) for news, run in groupby(d.is_news for d in late) if not news)
    assert in_a_row <= TOLD_EVERY
    # What was kept is what the engine went on choosing by: within the bound of what is best now.
    assert source.engine.last is not None and source.engine.last.staleness_steps == 1


def test_policy_is_sent_when_the_lengths_in_force_have_become_wrong() -> None:
    scripted, source = planned([0.9] * 8, Costs(token_s=0.002), steps=300)
    assert source.decisions[-1].lengths.mean() > 2
    seq = source.decisions[-1].policy.seq
    scripted.acceptance[:] = 0.02
    for _ in range(100):
        scripted.step()
    assert source.decisions[-1].policy.seq > seq
    assert source.decisions[-1].lengths.mean() < 1
    assert source.engine.last is not None and source.engine.last.num_drafted.mean() < 1


@pytest.mark.parametrize("late", [1, 3])
@pytest.mark.parametrize("lookup", [True, False], ids=["lookup", "draft_model"])
def test_policy_under_way_is_not_sent_again_when_policies_come_late(
    lookup: bool, late: int
) -> None:
    scripted, source = planned([0.8] * 6 + [0.3] * 6, steps=600, lookup=lookup)
    source.delay(late)
    for _ in range(300):
        scripted.step()
    news = [decision.is_news for decision in source.decisions[-280:]]
    assert sum(news) < len(news) / 3
    followed = [again for told, again in pairwise(news) if told]
    assert followed.count(True) < len(followed) / 3


def test_policy_is_kept_for_a_new_batch_that_it_suits_and_not_for_another() -> None:
    scripted, source = planned([0.8] * 4, Costs(knee=16, beyond_s=0.001), steps=300)
    while not source.decisions[-1].is_news:
        scripted.step()
    scripted.replace(1, np.array([0.8]))
    scripted.step()
    assert not source.decisions[-1].is_news
    scripted.set_batch(np.full(24, 0.8))
    scripted.step()
    assert source.decisions[-1].is_news


def test_policy_is_sent_again_when_it_did_not_arrive() -> None:
    scripted, source = planned([0.8] * 8, steps=300)
    while not source.decisions[-1].is_news:
        scripted.step()
    assert source.program is not None
    lost = source.decisions[-1].policy
    earlier = msgspec.structs.replace(lost, seq=lost.seq - 1)
    source.program = Program(earlier, source.engine.hello.limits.features, scripted.ids)
    for _ in range(LATE_STEPS):
        scripted.step()
        assert not source.decisions[-1].is_news
    scripted.step()
    assert source.decisions[-1].is_news


def test_policy_is_sent_again_when_it_never_went_out() -> None:
    scripted, source = planned([0.8] * 8, steps=300)
    while source.decisions[-1].is_news:
        scripted.step()
    assert source.planner.decide().is_news is False
    source.planner.tell_again()
    assert source.planner.decide().is_news


def test_batch_that_is_as_it_was_is_looked_at_every_other_step_once_steady(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("smartspec.daemon.planner.STEADY", 100)
    scripted, source = planned([0.8] * 6 + [0.3] * 6, steps=300)
    decided = [(d.report_seq, d.is_news) for d in source.decisions]
    early, late = decided[:100], decided[200:]
    assert all(seq == step for step, (seq, _) in enumerate(early, 1))
    behind = [step - seq for step, (seq, _) in enumerate(late, 201)]
    assert max(behind) == 1 and 0.3 < np.mean(behind) <= 0.5
    assert not any(news for lag, (_, news) in zip(behind, late, strict=True) if lag)
    for _ in range(10):  # whoever is new is looked at
        scripted.replace(1, np.array([0.8]))
        scripted.step()
        assert source.decisions[-1].report_seq == len(source.decisions)


@pytest.mark.parametrize("modes", [("ragged",), ("uniform",), ("ragged", "uniform")])
def test_every_mode_of_the_engine_gets_a_curve(modes: tuple[str, ...]) -> None:
    greeting = hello()
    limits = msgspec.structs.replace(greeting.limits, modes=modes)
    decision = decision_for(Engine(msgspec.structs.replace(greeting, limits=limits)))
    assert tuple(curve.mode for curve in decision.policy.curves) == modes


@pytest.mark.parametrize(("ragged_s", "mode"), [(0.0005, RAGGED), (0.03, UNIFORM)])
def test_one_length_for_all_is_chosen_where_several_cost_more_than_they_bring(
    ragged_s: float, mode: str
) -> None:
    costs = Costs(base_s=0.02, token_s=0.001, draft_token_s=0.0002, ragged_s=ragged_s)
    # Tokens per second at 0.03: 340 with length 3 or 4 for all, 307 with 5 for four; at 0.02: 350.
    acceptance = [0.95] * 4 + [0.1] * 4
    modes = (UNIFORM, RAGGED)
    _, source = planned(acceptance, costs, 400, lookup=False, modes=modes)
    late = source.decisions[-50:]
    assert sum(decision.mode == mode for decision in late) >= 45
    assert not all(decision.is_news for decision in late)  # nor told when it would say nothing new
    cost = source.engine.step_cost
    shape = StepShape(8, 8, 0, 1600)
    extra = cost.seconds(shape._replace(ragged=1.0)) - cost.seconds(shape)
    assert extra == pytest.approx(ragged_s, rel=0.3, abs=0.001)


def test_lengths_keep_to_what_was_available_when_drafts_are_not_known_first() -> None:
    decision = decision_for(
        Engine(hello(lookup=False)),
        features=wire.pack([0.9] * 3, "f32"),
        num_available=wire.pack([5, 2, 0], "u8"),
        num_drafted=wire.pack([2, 2, 0], "u8"),
        num_accepted=wire.pack([2, 2, 0], "u8"),
        num_emitted=wire.pack([3, 3, 1], "u8"),
    )
    assert decision.lengths[1] <= 2 and decision.lengths[2] == 0


# -- what it promises -----------------------------------------------------------------------------


def test_goodput_is_that_of_the_engine_when_models_have_settled() -> None:
    costs = Costs(base_s=0.02, token_s=0.001, noise=0.0)
    _, source = planned([0.8] * 6, costs, steps=300)
    decision = source.decisions[-1]

    def goodput(length: int) -> float:
        tokens = sum(0.8**j for j in range(length + 1))
        return 6 * tokens / (costs.base_s + costs.token_s * 6 * (1 + length) + 1e-4)

    best = max(goodput(k) for k in range(6))
    assert decision.goodput == pytest.approx(best, rel=0.08)
    # Of lengths that are not chosen less is known.
    assert decision.none.goodput == pytest.approx(goodput(0), rel=0.15)
    assert decision.static().goodput == pytest.approx(goodput(3), rel=0.15)
    # A lookup's drafts are expected ones, of which the best so many are nearly the best choice.
    assert decision.goodput >= max(decision.none.goodput, decision.static().goodput) * (1 - 1e-3)


def test_lengths_shrink_when_the_batch_grows() -> None:
    costs = Costs(base_s=0.02, token_s=0.0015, noise=0.0)
    means = [
        float(np.mean([c.lengths.mean() for c in planned([0.6] * size, costs)[0].choices[-20:]]))
        for size in (1, 16, 64)
    ]
    assert means[0] > means[1] > means[2]
    assert means[0] > 2 and means[2] < 0.5


def test_fallback_table_has_shorter_lengths_for_larger_batches() -> None:
    costs = Costs(base_s=0.02, token_s=0.0015, noise=0.0)
    scripted, source = planned([0.6] * 8, costs)
    for size in (2, 30, 8):
        scripted.set_batch(np.full(size, 0.6))
        for _ in range(60):
            scripted.step()
    policy = source.decisions[-1].policy
    assert policy.fallback_batch[0] == 1 and policy.fallback_batch[-1] == 512
    # A length more is what an error of the learned cost curve at one of its knots may make.
    assert np.diff(policy.fallback_length).max() <= 1
    assert policy.fallback_length[0] >= 3 and policy.fallback_length[-1] == 0


KNEE = Costs(base_s=0.01, token_s=2e-5, knee=128, beyond_s=1e-4, noise=0.0)


def after_batches(*sizes: int) -> tuple[ScriptedEngine, Steering]:
    """An engine whose passes are dear from 128 tokens on, after batches of these sizes."""
    scripted, source = planned([0.75] * sizes[0], KNEE, 0)
    for size in sizes:
        scripted.set_batch(np.full(size, 0.75))
        for _ in range(120):
            scripted.step()
    return scripted, source


def test_fallback_table_is_as_good_for_large_batches_when_the_last_one_was_small() -> None:
    _, source = after_batches(4, 64, 256, 128, 32, 256, 16, 4)
    policy = source.decisions[-1].policy
    table = dict(zip(policy.fallback_batch, policy.fallback_length, strict=True))
    for size in (1, 4, 16, 64, 150, 256, 512):
        length = table[max(batch for batch in table if batch <= size)]
        goodputs = []
        for k in range(6):
            num_tokens = size * (1 + k)
            seconds = KNEE.base_s + KNEE.token_s * num_tokens
            seconds += KNEE.beyond_s * max(0, num_tokens - KNEE.knee)
            goodputs.append(size * sum(0.75**j for j in range(k + 1)) / seconds)
        assert goodputs[length] > 0.9 * max(goodputs), (size, length)


def test_policy_made_for_a_small_batch_knows_what_drafts_of_a_large_one_cost() -> None:
    scripted, source = after_batches(4, 64, 256, 128, 32, 256, 16, 4)
    features = source.engine.hello.limits.features
    program = Program(source.decisions[-1].policy, features, scripted.ids)
    for size in (16, 64, 256):
        choice = program.choose(decode_batch(range(1000, 1000 + size)))
        num_tokens = size + int(choice.lengths.sum())
        seconds = KNEE.base_s + KNEE.token_s * num_tokens
        seconds += KNEE.beyond_s * max(0, num_tokens - KNEE.knee)
        assert choice.seconds == pytest.approx(seconds, rel=0.15)


@pytest.mark.parametrize("num_waiting", [0, 3])
def test_steps_are_comparable_once_models_know_enough_though_a_sweep_waits_for_the_queue(
    num_waiting: int,
) -> None:
    scripted, source = planned([0.6] * 8, steps=YOUNG, num_waiting=num_waiting)
    assert not any(decision.is_comparable for decision in source.decisions)
    for _ in range(50):
        scripted.step()
    assert source.planner.prober.sweeping == (num_waiting > 0)
    assert all(decision.is_comparable for decision in source.decisions[YOUNG:])
    scripted.num_waiting = 0
    for _ in range(50):
        scripted.step()
    late = source.decisions[YOUNG + 50 :]
    assert any(decision.order.is_sweep for decision in late) == (num_waiting > 0)
    assert all(decision.is_comparable != decision.order.is_sweep for decision in late)


# -- and why --------------------------------------------------------------------------------------


def test_reason_says_what_was_decided() -> None:
    cheap = Costs(base_s=0.05, token_s=1e-5, noise=0.0)
    dear = Costs(base_s=0.001, token_s=0.01, noise=0.0)
    reason = planned([0.97] * 3, cheap)[1].decisions[-1].policy.reason
    assert reason.startswith("3 running: length 5 for all; ")
    assert "over none" in reason
    scripted, source = planned([0.02] * 3, dear)
    assert "no speculation: drafts would cost more" in source.decisions[-1].policy.reason
    scripted.num_waiting = 12
    scripted.step()
    assert source.decisions[-1].policy.reason.startswith("3 running, 12 waiting: ")
    mixed = planned([0.98] * 4 + [0.02] * 4, Costs(base_s=0.01, token_s=0.002))[1]
    assert "lengths 0-5 (mean " in mixed.decisions[-1].policy.reason
    assert any("seed sweep, length " in d.policy.reason for d in source.decisions)


# -- what single requests ask for -----------------------------------------------------------------

BUSY = Costs(base_s=0.010, token_s=0.0006)


def mean_lengths(scripted: ScriptedEngine, steps: int) -> np.ndarray:
    """Of each request, over the last ``steps``."""
    mean: np.ndarray = np.mean([choice.lengths for choice in scripted.choices[-steps:]], axis=0)
    return mean


def test_priorities_change_lengths() -> None:
    """Requests that are as predictable as the others, but worth more, get longer drafts."""
    weight = np.ones(24, np.float32)
    weight[:6] = 8.0
    scripted, _ = planned(np.full(24, 0.6), BUSY, 300, lookup=False, weight=weight)
    lengths = mean_lengths(scripted, 50)
    assert lengths[:6].mean() > lengths[6:].mean() + 1


def share_in_time(scripted: ScriptedEngine, steps: int, target_s: float, who: slice) -> float:
    """Share of (step, request) whose expected time per token is within the target."""
    costs, a, in_time = scripted.costs, scripted.acceptance, []
    for choice in scripted.choices[-steps:]:
        k = choice.lengths
        seconds = costs.base_s + costs.token_s * (len(k) + int(k.sum()))
        tokens = (1 - a ** (k + 1)) / (1 - a)
        in_time.append((seconds <= tokens * target_s)[who])
    return float(np.mean(in_time))


@pytest.mark.parametrize("seed", range(3))
def test_feasible_target_is_met_more_often_than_without_it(seed: int) -> None:
    # All at length 1, near the best for goodput: 48 ms a step, 28 ms per token. These four alone at
    # length 2: 34 ms a step, 15 ms per token of theirs.
    target_s, who = 0.018, slice(0, 4)
    target = np.zeros(32, np.float32)
    target[who] = target_s
    shares = {}
    for meet in (True, False):
        scripted, source = planned(
            np.full(32, 0.75),
            BUSY,
            400,
            meet_targets=meet,
            lookup=False,
            token_time_target_s=target,
            seed=seed,
        )
        shares[meet] = share_in_time(scripted, 100, target_s, who)
        decision = source.decisions[-1]
        assert decision.order.num_targets == (4 if meet else 0)
        assert ("4 with a target" in decision.policy.reason) == meet
    assert shares[True] > shares[False] + 0.4, shares


@pytest.mark.parametrize("meet", [True, False])
def test_drafts_are_worth_a_token_each_where_targets_are_met(meet: bool) -> None:
    target = np.zeros(8, np.float32)
    target[0] = 1.0
    _, source = planned(np.full(8, 0.6), meet_targets=meet, token_time_target_s=target)
    assert source.engine.learned.continuation.is_known
    assert (source.decisions[-1].policy.worth == b"") == meet


def test_target_that_cannot_be_met_is_reported_and_bends_nothing() -> None:
    target = np.zeros(32, np.float32)
    target[:2] = 0.001
    lengths = []
    for targets in (target, None):
        scripted, source = planned(
            np.full(32, 0.75), BUSY, 300, lookup=False, token_time_target_s=targets
        )
        lengths.append([choice.lengths.tolist() for choice in scripted.choices])
        if targets is not None:
            assert source.decisions[-1].order.num_out_of_reach == 2
            reason = source.decisions[-1].policy.reason
            assert reason.endswith("; 2 with a target, 2 of them out of reach")
    assert lengths[0] == lengths[1]


# -- what an engine may decide of itself ----------------------------------------------------------


def test_depth_is_left_to_small_batches_but_in_sweeps_and_comparisons() -> None:
    engine = Engine(hello(lookup=False))
    engine.observe(step_report(1, features=wire.pack([[0.0] * 3], "f32")))
    planner = Planner(engine, daemon_epoch=9, seed_sweep=False, probe_share=0.0)
    steered, compared = planner.decide(), planner.decide(Arm.NONE)
    assert steered is not None and compared is not None
    assert (steered.policy.deepest, compared.policy.deepest) == (engine.max_length, 0)
    swept = Planner(engine, daemon_epoch=9, seed_sweep=True).decide()
    assert swept is not None and swept.order.is_sweep and swept.policy.deepest == 0


def test_batch_goes_on_where_it_would_be_drafted_for_without_first_drafts() -> None:
    limits = hello(lookup=False).limits
    features = (*limits.features, wire.FEATURE_DRAFT_CONFIDENCE)
    introduced = msgspec.structs.replace(
        hello(lookup=False), limits=msgspec.structs.replace(limits, features=features)
    )
    for forward_s, goes_on in ((0.001, True), (1.0, False)):
        engine = Engine(introduced)
        planner = Planner(engine, daemon_epoch=9, seed_sweep=False, probe_share=0.0)
        for seq in range(1, 200):
            length = seq % 3
            rows = [[0.0] * 3] * len(limits.features) + [[0.05, 0.6, wire.NOT_RUN]]
            report = step_report(
                seq,
                features=wire.pack(rows, "f32"),
                num_drafted=wire.pack([length] * 3, "u8"),
                num_accepted=wire.pack([min(length, seq % 2)] * 3, "u8"),
                num_emitted=wire.pack([1 + min(length, seq % 2)] * 3, "u8"),
                target_s=0.02,
                draft_s=forward_s * length,
                step_s=0.02 + forward_s * length,
                num_draft_forwards=length,
                num_draft_tokens=3 * length,
            )
            observation = engine.observe(report)
            decision = planner.decide()
            engine.learn(observation)
        assert decision is not None
        assert decision.policy.goes_on is goes_on
