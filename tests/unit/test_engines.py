"""What is believed of an engine: checks, rosters, gaps, and what a restart keeps."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from fakes import step_report
from scripted_engine import hello

from smartspec.daemon.engines import Engine, Numbering, RosterGap
from smartspec.daemon.outlook import Outlook
from smartspec.engine_adapter import messages as wire
from smartspec.estimators.features import BUCKET_EDGES

NAN, INF = float("nan"), float("inf")


def engine(previous: Engine | None = None, *, epoch: int = 1, **limits: Any) -> Engine:
    greeting = hello(epoch=epoch)
    changed = msgspec.structs.replace(greeting.limits, **limits)
    return Engine(msgspec.structs.replace(greeting, limits=changed), previous)


def roster(ids: list[int], version: int = 1, **more: Any) -> wire.Roster:
    return wire.Roster(version=version, request_ids=wire.pack(ids, "u64"), **more)


def column(*values: int) -> bytes:
    return wire.pack(values, "u8")


# -- what is refused ------------------------------------------------------------------------------

BAD_REPORTS: dict[str, dict[str, Any]] = {
    "epoch": {"epoch": 2},
    "seq: 0 after 0": {"seq": 0},
    "step_s: nan": {"step_s": NAN},
    "step_s: inf": {"step_s": INF},
    "step_s: -1": {"step_s": -1.0},
    "step_s: 601": {"step_s": 601.0},
    "step_s: 0.0, a step": {"step_s": 0.0, "target_s": None, "draft_s": None},
    "target_s: nan": {"target_s": NAN},
    "draft_s: -0.1": {"draft_s": -0.1},
    "more than step_s": {"target_s": 0.029, "draft_s": 0.029},
    "kv_usage": {"kv_usage": NAN},
    "kv_usage: 1.5": {"kv_usage": 1.5},
    "num_prefill_tokens": {"num_prefill_tokens": 2**23},
    "context_tokens": {"context_tokens": 2**40},
    "num_draft_forwards": {"num_draft_forwards": 2**63},
    "num_draft_tokens": {"num_draft_tokens": 2**63},
    "num_catch_up_tokens": {"num_catch_up_tokens": 2**63},
    "num_waiting": {"num_waiting": 2**63},
    "num_drafted: 2 bytes": {"num_drafted": column(1, 1)},
    "num_accepted: 4 bytes": {"num_accepted": column(1, 1, 1, 1)},
    "num_accepted: more than drafted": {"num_accepted": column(3, 0, 0)},
    "num_drafted: over": {"num_drafted": column(6, 0, 0), "num_accepted": column(0, 0, 0)},
    "num_emitted: more": {"num_emitted": column(3, 1, 1)},
    "features: 4 bytes": {"features": wire.pack([1.0], "f32")},
    "features: holds": {"features": wire.pack([[NAN] * 3, [1.0] * 3], "f32")},
    "roster.version": {"roster": roster([1, 2, 3], 2)},
    "request_ids: 9 bytes": {"roster": wire.Roster(version=1, request_ids=bytes(9))},
    "request_ids: not unique": {"roster": roster([1, 2, 1])},
    "request_ids: 513 requests": {"roster": roster(list(range(513)))},
    "weight: must be": {"roster": roster([1, 2, 3], weight=wire.pack([1, 0, 1], "f32"))},
    "weight: must be in": {"roster": roster([1, 2, 3], weight=wire.pack([1, 1e9, 1], "f32"))},
    "step_s: 1e-60": {"step_s": 1e-60, "target_s": None, "draft_s": None},
    "weight: holds": {"roster": roster([1, 2, 3], weight=wire.pack([1, NAN, 1], "f32"))},
    "weight: 4 bytes": {"roster": roster([1, 2, 3], weight=wire.pack([1], "f32"))},
    "token_time_target_s: holds": {
        "roster": roster([1, 2, 3], token_time_target_s=wire.pack([1, NAN, 1], "f32"))
    },
    "token_time_target_s: holds a value": {
        "roster": roster([1, 2, 3], token_time_target_s=wire.pack([1, -1, 1], "f32"))
    },
    "token_time_target_s: 4 bytes": {
        "roster": roster([1, 2, 3], token_time_target_s=wire.pack([1], "f32"))
    },
    "floor: 1 bytes": {"roster": roster([1, 2, 3], floor=column(1))},
}


@pytest.mark.parametrize("message", BAD_REPORTS)
def test_report_is_refused_whole_when_a_field_cannot_be_true(message: str) -> None:
    new = engine()
    with pytest.raises(wire.MessageError, match=message):
        new.observe(step_report(**({"seq": 1} | BAD_REPORTS[message])))
    assert new.last is None and new.batch is None
    assert (new.last_seq, new.num_reports, new.num_missed) == (0, 0, 0)
    new.observe(step_report(1))  # the same engine, now honest


def test_sources_and_modes_of_a_newer_engine_are_taken_for_the_plainest() -> None:
    new = engine()
    for seq, source in enumerate((*wire.SOURCES, "", "x" * 200, "beam"), 1):
        report = new.observe(step_report(seq, source=source, mode=source)).report
        assert report.source == (source if source in wire.SOURCES else "own")
        assert report.mode == "ragged"
    assert new.observe(step_report(8, mode="uniform")).report.mode == "uniform"


def test_report_is_refused_when_it_skips_more_steps_than_an_engine_makes() -> None:
    new = engine()
    new.observe(step_report(1))
    with pytest.raises(wire.MessageError, match="seq: 18446744073709551615 after 1"):
        new.observe(step_report(2**64 - 1, roster=False))
    new.observe(step_report(3, roster=False))
    assert (new.last_seq, new.num_missed) == (3, 1)


def test_engine_is_refused_whose_batch_takes_too_long_to_decide_for() -> None:
    with pytest.raises(wire.MessageError, match="4096 requests of 64 drafts each, at most 65536"):
        Engine(hello(max_length=64, max_num_running=4096))


def test_engine_is_refused_whose_buckets_no_policy_can_tell_of() -> None:
    every = {"features": tuple(BUCKET_EDGES), "max_num_running": 8}
    with pytest.raises(wire.MessageError, match="features: together they make 7200 buckets"):
        engine(**every)
    engine(features=tuple(BUCKET_EDGES)[1:], max_num_running=8)


def test_engine_without_drafts_teaches_what_steps_cost_though_it_speaks_of_trees() -> None:
    new = engine(trees=True, max_length=0, static_length=0)
    none = dict.fromkeys(("num_drafted", "num_accepted", "num_emitted", "num_available"), b"")
    for seq in range(1, 4):
        new.learn(new.observe(step_report(seq, **none)))
    assert new.step_cost.num_observed == 3


def test_tokens_count_by_weight_as_they_were_emitted() -> None:
    """A request that stops takes fewer of its drafts than were accepted."""
    facts = {"num_accepted": column(2, 2, 2), "num_emitted": column(1, 1, 3)}
    for weights, tokens in (((1, 1, 1), 5.0), ((2, 1, 4), 15.0)):
        weight = wire.pack(weights, "f32")
        told = step_report(1, roster=roster([1, 2, 3], weight=weight), **facts)
        assert engine().observe(told).weighted_tokens == tokens


RANKS = {
    "num_drafted": column(4, 5, 0),
    "num_accepted": column(2, 0, 0),
    "num_emitted": column(3, 1, 1),
}
BAD_RANKS: dict[str, list[int]] = {
    "accepted_ranks: 8 bytes": [1],
    "accepted_ranks: one that was not drafted": [17, 0, 0],
    "accepted_ranks: one that": [5, 0, 1 << 63],
    "accepted_ranks: not num_accepted": [1, 0, 0],
    "accepted_ranks: not": [],
}


@pytest.mark.parametrize("message", BAD_RANKS)
def test_report_is_refused_when_its_ranks_cannot_be_true(message: str) -> None:
    new = engine(trees=True)
    ranks = wire.pack(BAD_RANKS[message], "u64")
    with pytest.raises(wire.MessageError, match=message):
        new.observe(step_report(1, **RANKS, accepted_ranks=ranks))
    new.observe(step_report(1, **RANKS, accepted_ranks=wire.pack([9, 0, 0], "u64")))


CUT = {
    "num_drafted": column(2, 0, 2),
    "num_accepted": column(2, 0, 1),
    "num_emitted": column(3, 1, 2),
}
BAD_CUTS: dict[str, tuple[bytes, bytes]] = {
    "num_cut: 2 bytes": (column(1, 1), b""),
    "num_cut: over limits.max_length": (column(0, 6, 0), b""),
    "num_cut_accepted: 1 bytes": (column(1, 1, 1), column(1)),
    "num_cut_accepted: more than cut": (column(1, 0, 0), column(0, 1, 0)),
}


@pytest.mark.parametrize("message", BAD_CUTS)
def test_report_is_refused_when_what_was_cut_cannot_be_true(message: str) -> None:
    new = engine()
    cut, passed = BAD_CUTS[message]
    with pytest.raises(wire.MessageError, match=message):
        new.observe(step_report(1, **CUT, num_cut=cut, num_cut_accepted=passed))
    new.observe(step_report(1, **CUT, num_cut=column(3, 5, 3)))


def test_cut_drafts_count_as_the_engine_tells_unless_one_before_was_rejected() -> None:
    new = engine()
    report = step_report(
        1, **CUT, num_cut=column(3, 3, 3), num_cut_accepted=column(1, 2, 3), source="policy"
    )
    observation = new.observe(report)
    assert observation.accepted.tolist() == [3, 2, 1]
    assert observation.num_learned.tolist() == [5, 3, 5]
    # What was verified is what it cost, and what was won.
    assert observation.num_drafted.tolist() == [2, 0, 2]
    assert observation.num_accepted.tolist() == [2, 0, 1]


BAD_CUT_RANKS: dict[str, list[int]] = {
    "accepted_ranks: one that was not drafted": [0b11 | 1 << 5, 0, 1],
    "accepted_ranks: not num_accepted of them": [0b101, 0, 1],
    "accepted_ranks: not num_cut_accepted": [0b11011, 0, 1],
}


@pytest.mark.parametrize("message", BAD_CUT_RANKS)
def test_ranks_that_were_cut_count_as_the_engine_tells(message: str) -> None:
    new = engine(trees=True)
    told = CUT | {"num_cut": column(3, 2, 0), "num_cut_accepted": column(1, 1, 0)}
    with pytest.raises(wire.MessageError, match=message):
        ranks = wire.pack(BAD_CUT_RANKS[message], "u64")
        new.observe(step_report(1, **told, accepted_ranks=ranks))
    ranks = wire.pack([0b10011, 0b10, 0b01], "u64")
    observation = new.observe(step_report(1, **told, accepted_ranks=ranks))
    assert observation.num_learned.tolist() == [5, 2, 2]
    assert observation.num_drafted.tolist() == [2, 0, 2]
    assert [np.flatnonzero(row).tolist() for row in observation.accepted] == [[0, 1, 4], [1], [0]]


def test_ranks_are_learned_of_trees_and_nothing_of_them_of_chains() -> None:
    trees, chains = engine(trees=True), engine()
    assert trees.key.id != chains.key.id
    for seq in range(1, 300):
        report = step_report(
            seq,
            num_drafted=column(4, 4, 4),
            num_accepted=column(1, 1, 1),
            num_emitted=column(2, 2, 2),
            accepted_ranks=wire.pack([2, 2, 2], "u64"),  # always the second node
        )
        for one in (trees, chains):
            one.learn(one.observe(report))
    assert trees.acceptance.pooled_hazards().argmax() == 1
    assert chains.acceptance.pooled_hazards().argmax() == 0


def test_forwards_are_learned_of_trees_alone() -> None:
    for trees, expected in ((True, 2.0), (False, 4.0)):
        one = engine(trees=trees, drafts_known_first=False)
        for seq in range(1, 300):
            one.learn(
                one.observe(
                    step_report(
                        seq,
                        num_drafted=column(4, 1, 0),
                        num_accepted=column(0, 0, 0),
                        num_emitted=column(1, 1, 1),
                        num_draft_forwards=2,
                    )
                )
            )
        assert one.draft_cost().num_forwards(4) == pytest.approx(expected, abs=0.05)


BAD_HELLOS: dict[str, dict[str, Any]] = {
    "graph_sizes: must rise": {"graph_sizes": (8, 4)},
    "graph_sizes: must rise, from": {"graph_sizes": (0, 4)},
    "graph_sizes: must": {"graph_sizes": (4, 4)},
    "at most 4194304": {"graph_sizes": (4, 2**40)},
    "graph_sizes: more than": {"graph_sizes": tuple(range(1, 2000))},
    "modes: at least": {"modes": ()},
    "modes: named twice": {"modes": ("ragged", "ragged")},
    "modes: more than": {"modes": tuple(str(i) for i in range(100))},
    "features: named twice": {"features": ("match_length",) * 2},
    "features: more than": {"features": tuple(str(i) for i in range(100))},
    "static_length": {"static_length": 6},
}


@pytest.mark.parametrize("message", BAD_HELLOS)
def test_engine_is_refused_when_its_limits_contradict_themselves(message: str) -> None:
    with pytest.raises(wire.MessageError, match=message):
        engine(**BAD_HELLOS[message])


@pytest.mark.parametrize("name", ["", "two\nlines", "\x1b[31mred"])
def test_engine_is_refused_when_its_name_cannot_be_shown(name: str) -> None:
    with pytest.raises(wire.MessageError, match="printable"):
        Engine(hello(name))


# -- rosters and sequence -------------------------------------------------------------------------


def test_roster_holds_until_the_next_when_reports_leave_it_out() -> None:
    new = engine()
    first = new.observe(step_report(1, [5, 6, 7]))
    second = new.observe(step_report(2, roster=False))
    assert second.batch is first.batch
    assert second.batch.ids.tolist() == [5, 6, 7]
    third = new.observe(step_report(3, [7, 8], roster_version=2))
    assert third.batch.ids.tolist() == [7, 8]


def test_step_is_behind_the_bucket_of_the_last_where_no_draft_was_rejected() -> None:
    state = engine()

    def behind(seq: int, ids: list[int], matches: list[float], **more: Any) -> list[int]:
        features = wire.pack([[-1.0] * len(ids), matches], "f32")
        size = {"num_emitted": column(*[1] * len(ids)), "features": features}
        given = {"roster_version": seq, "roster": roster(ids, seq)}
        return state.observe(step_report(seq, ids, **given, **size, **more)).behind.tolist()

    drafts = {"num_drafted": column(2, 2, 0, 0), "num_accepted": column(2, 1, 0, 0)}
    found = {"num_available": column(5, 5, 5, 0)}
    long, short = 5, 1  # buckets of matches of 16 and of 3 tokens
    first = behind(1, [1, 2, 3, 4], [16.0, 16.0, 3.0, 0.0], **drafts, **found)
    assert first == [-1] * 4  # nothing is known of a step before
    none = {"num_drafted": column(0, 0, 0, 0), "num_accepted": column(0, 0, 0, 0)}
    # 2 had a draft rejected, 4 had none, 5 has come, and they stand in another order
    assert behind(2, [5, 3, 2, 1], [3.0] * 4, **none, **found) == [-1, short, -1, long]
    after_gap = behind(4, [5, 3, 2, 1], [3.0] * 4, **none, **found)
    assert after_gap == [-1] * 4


def test_report_asks_for_the_roster_when_it_was_never_received() -> None:
    new = engine()
    with pytest.raises(RosterGap):
        new.observe(step_report(1, roster=False))
    new.observe(step_report(2))
    with pytest.raises(RosterGap):
        new.observe(step_report(3, roster_version=2, roster=False))
    # Sent again, it is taken, and the steps without one count as missed.
    assert new.observe(step_report(4, roster_version=2)).batch.version == 2
    assert new.num_missed == 1


def test_steps_are_counted_as_missed_when_numbers_are_skipped() -> None:
    new = engine()
    new.observe(step_report(1000))  # it ran long before we did: nothing was missed
    assert new.num_missed == 0
    for seq in (1001, 1005, 1006):
        new.observe(step_report(seq, roster=False))
    assert new.num_missed == 3


def test_report_is_refused_and_counted_when_it_comes_twice_or_late() -> None:
    new = engine()
    for seq in (1, 2, 3):
        new.observe(step_report(seq))
    for seq in (3, 1):
        with pytest.raises(wire.MessageError, match=f"seq: {seq} after 3"):
            new.observe(step_report(seq))
    assert (new.num_repeated, new.num_reports, new.last_seq) == (2, 3, 3)


def test_staleness_is_steps_since_the_report_that_the_policy_knew() -> None:
    new = engine()
    new.observe(step_report(1))
    policy_seq = new.next_policy_seq(1)
    assert new.observe(step_report(2, roster=False)).staleness_steps is None
    seen = new.observe(step_report(3, roster=False, policy_seq=policy_seq))
    assert seen.staleness_steps == 2


def test_bucket_is_that_of_the_newest_drafts_when_a_lookup_misses() -> None:
    new = engine()
    matched = wire.pack([[-1.0] * 3, [9.0] * 3], "f32")
    missed = wire.pack([[-1.0] * 3, [0.0] * 3], "f32")
    new.observe(step_report(1, features=matched))
    bucket = new.last_bucket.copy()
    new.observe(
        step_report(
            *(2, (3, 1, 4)),
            features=missed,
            num_available=column(0, 0, 0),
            num_drafted=b"",
            num_accepted=b"",
            num_emitted=b"",
            roster_version=2,
        )
    )
    assert new.last_bucket[:2].tolist() == bucket[:2].tolist()
    assert new.last_bucket[2] != bucket[0]  # a new request: nothing better is known of it


def test_steps_without_requests_are_taken() -> None:
    new = engine()
    observation = new.observe(step_report(1, [], num_prefill_tokens=64))
    assert observation.num_emitted == 0 and not observation.drafted_any
    assert new.learn(observation) is not None
    assert new.learn(new.observe(step_report(2, [], num_prefill_tokens=0))) is None


# -- learning -------------------------------------------------------------------------------------


def learned(previous: Engine | None = None, steps: int = 150, **more: Any) -> Engine:
    """An engine whose drafts are all accepted at first, never at the second depth."""
    new = engine(previous, **more)
    for seq in range(1, steps + 1):
        new.learn(new.observe(step_report(seq, roster=seq == 1, epoch=new.hello.epoch)))
    return new


def test_acceptance_is_learned_by_depth_from_reports() -> None:
    hazards = learned().acceptance.pooled_hazards()
    assert hazards[0] > 0.9 and hazards[1] < 0.1


def test_cost_is_predicted_when_steps_repeat() -> None:
    new = learned()
    predicted = new.learn(new.observe(step_report(151, roster=False)))
    assert predicted == pytest.approx(0.03, rel=0.05)


def test_restart_keeps_what_was_learned_but_not_the_requests() -> None:
    old = learned()
    restarted = engine(old, epoch=2)
    assert restarted.is_warm and restarted.num_reports == 0
    assert restarted.acceptance.pooled_hazards()[0] > 0.9
    rows = restarted.acceptance.rows(np.array([1, 2, 3], np.uint64))
    assert restarted.acceptance.corrections(rows).tolist() == [1.0, 1.0, 1.0]
    # Warmth lasts over a second restart, though little was reported in between.
    assert engine(learned(restarted, steps=3, epoch=2), epoch=3).is_warm


@pytest.mark.parametrize(
    "limits",
    [
        {"max_length": 4},
        {"features": ("last_accepted_share",)},
        {"graph_sizes": (1, 2, 4)},
        {"drafts_known_first": False},
        {"keeps_up": True},
    ],
)
def test_restart_begins_anew_when_the_models_would_not_fit(limits: dict[str, Any]) -> None:
    restarted = engine(learned(), epoch=2, **limits)
    assert not restarted.is_warm
    assert restarted.acceptance.pooled_hazards()[0] < 0.9


def test_restart_begins_anew_when_the_fingerprint_differs() -> None:
    old = learned()
    other = msgspec.structs.replace(
        hello(epoch=2), fingerprint=wire.Fingerprint(target="another", proposer="lookup")
    )
    assert Engine(other, old).acceptance.pooled_hazards()[0] < 0.9


def test_reports_count_on_when_an_engine_returns_in_the_same_epoch() -> None:
    old = engine()
    old.observe(step_report(7))
    with pytest.raises(wire.MessageError, match="seq: 7 after 7"):
        engine(old).observe(step_report(7))
    assert engine(old, epoch=2).observe(step_report(1, epoch=2)).report.seq == 1


def test_policies_are_numbered_over_all_engines() -> None:
    numbering = Numbering()
    one, other = (Engine(hello(name), numbering=numbering) for name in "ab")
    assert [made.next_policy_seq(1) for made in (one, one, other, one)] == [1, 2, 3, 4]
    assert (one.policy_seq, other.policy_seq) == (4, 3)
    # What it may hold already is older than whatever it will be told.
    assert Engine(hello("a"), numbering=numbering).policy_seq == 4


#: Milliseconds by length of an engine whose drafter runs its first forward anyway.
KEPT_UP_MS = (17.0, 18.0, 27.0, 36.0, 45.0, 54.0)


def predicted_ms(*, keeps_up: bool) -> list[float]:
    """What steps should take by length, after each was tried some times, and 0 all the time."""
    limits: dict[str, Any] = {"graph_sizes": (8, 16), "drafts_known_first": False}
    made = engine(features=(), keeps_up=keeps_up, **limits)
    rng = np.random.default_rng(0)
    for seq in range(1, 241):
        length = seq % 6 if seq <= 120 else 0
        report = step_report(
            seq,
            [1],
            roster=seq == 1,
            features=b"",
            step_s=1e-3 * KEPT_UP_MS[length] * float(np.exp(0.02 * rng.standard_normal())),
            target_s=None,
            draft_s=None,
            num_drafted=column(length),
            num_accepted=column(length),
            num_emitted=column(length + 1),
            num_available=column(5),
            num_draft_forwards=length,
            num_draft_tokens=length,
        )
        made.learn(made.observe(report))
    assert made.last is not None
    outlook = Outlook.of(made, made.last, np.log(np.full((5, 1), 0.5, np.float32)))
    return [1e3 * outlook.at_length(length).seconds for length in range(6)]


def test_first_draft_costs_what_it_adds_when_its_forward_is_run_anyway() -> None:
    assert predicted_ms(keeps_up=True) == pytest.approx(KEPT_UP_MS, rel=0.06)
    # Otherwise a first draft is taken to cost as much as another one.
    assert predicted_ms(keeps_up=False)[1] > 1.2 * KEPT_UP_MS[1]


def test_looking_up_drafts_is_charged_at_what_it_costs() -> None:
    """Such engines report no draft tokens: the prior's cost of drafting must not stay."""
    made = engine()
    for seq in range(1, 301):
        report = step_report(seq, roster=seq == 1, epoch=1)
        report = msgspec.structs.replace(report, num_draft_tokens=0, draft_s=0.0)
        made.learn(made.observe(report))
    fixed_s, per_forward_s, per_token_s = made.step_cost.draft_cost()
    assert fixed_s + per_forward_s + 8 * per_token_s < 0.0001
