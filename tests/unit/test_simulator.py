"""The engine in virtual time: order, conservation, costs, acceptance, and the rivals' rules."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from smartspec.engine_adapter.base import DecodeBatch, StepFacts
from smartspec.engine_adapter.simulator import acceptance, arrivals, profile
from smartspec.engine_adapter.simulator.events.arrival import Arrival
from smartspec.engine_adapter.simulator.events.base import Queue
from smartspec.engine_adapter.simulator.events.daemon_turn import DaemonTurn, HeartbeatTurn
from smartspec.engine_adapter.simulator.events.step_begin import StepBegin
from smartspec.engine_adapter.simulator.events.step_end import StepEnd
from smartspec.engine_adapter.simulator.requests import Traffic
from smartspec.lab.simulation import experiment, policies, workload
from smartspec.lab.simulation.static_table import ListedLengths
from smartspec.lab.simulation.world import Cell, Fleet, rival, simulate

DATA = os.environ.get("SMARTSPEC_DATA")


def cell(rate: float = 4.0, until_s: float = 10.0, seed: int = 1, **more: object) -> Cell:
    rng = np.random.default_rng(seed)
    times = arrivals.poisson(rate, until_s, rng)
    traffic = arrivals.exponential_lengths(times, 300, 60, rng)
    made = Cell(
        profile.load("h100_8b"),
        "eagle",
        traffic,
        acceptance.draw(acceptance.BetaOverRequests(0.7), traffic.num_output, max_length=5, seed=2),
    )
    return replace(made, **more)  # type: ignore[arg-type]


@dataclass
class Note:
    """An event that writes down its name."""

    order: int
    name: str
    written: ClassVar[list[str]] = []

    def happen(self, queue: Queue) -> None:
        self.written.append(self.name)


def test_order_at_equal_times_is_by_kind_and_then_as_scheduled() -> None:
    kinds = [StepEnd, Arrival, StepBegin, DaemonTurn, HeartbeatTurn]
    orders = [kind.order for kind in kinds]
    assert orders == sorted(set(orders))
    queue = Queue()
    Note.written.clear()
    for name, order in (("c", 2), ("a2", 0), ("b", 1), ("a3", 0)):
        queue.put(1.0, Note(order, name))
    queue.put(0.5, Note(9, "first"))
    queue.run()
    assert Note.written == ["first", "a2", "a3", "b", "c"]
    with pytest.raises(ValueError, match="before now"):
        queue.put(0.1, Note(0, "late"))


@pytest.mark.parametrize("name", ["none", "static3", "tiers", "bandit", "informed", "smartspec"])
def test_every_request_is_served_once_and_whole(name: str) -> None:
    engine = simulate(name, cell())
    served = engine.served
    assert np.isfinite(served.finished_s).all()
    assert (served.time_to_first_s > 0).all() and (served.latency_s >= served.time_to_first_s).all()
    assert (engine._emitted == engine.traffic.num_output).all()


@pytest.mark.parametrize("name", ["bandit", "smartspec"])
def test_runs_repeat_bit_for_bit(name: str) -> None:
    first, second = (simulate(name, cell()).served for _ in range(2))
    assert first.finished_s.tobytes() == second.finished_s.tobytes()
    assert first.first_token_s.tobytes() == second.first_token_s.tobytes()


def test_one_request_takes_what_the_profile_says_without_noise() -> None:
    gpu = profile.load("h100_8b")
    traffic = Traffic(np.array([0.5]), np.array([100]), np.array([3]))
    none = acceptance.draw(acceptance.Constant(0.0), traffic.num_output, max_length=5, seed=0)
    engine = simulate("none", Cell(gpu, "eagle", traffic, none, noise=0.0))
    prefill = gpu.target_seconds(0, 0, 0, (profile.Chunk(100, 0),))
    decode = gpu.target_seconds(1, 1, 101) + gpu.target_seconds(1, 1, 102)
    assert engine.served.time_to_first_s[0] == pytest.approx(prefill)
    assert engine.served.latency_s[0] == pytest.approx(prefill + decode)


def test_drafts_are_accepted_as_the_outcomes_say() -> None:
    traffic = Traffic(np.array([0.0]), np.array([10]), np.array([25]))
    sure = acceptance.draw(acceptance.Constant(1.0), traffic.num_output, max_length=5, seed=0)
    engine = simulate("static5", Cell(profile.load("h100_8b"), "eagle", traffic, sure))
    assert engine.num_steps == 1 + 4  # the prompt's step gives one token, the others six
    assert engine.num_accepted == engine.num_drafted == 20


def test_long_prompts_are_cut_into_chunks_of_the_token_budget() -> None:
    gpu = profile.load("h100_8b")
    traffic = Traffic(np.array([0.0]), np.array([2 * gpu.chunk_tokens + 5]), np.array([1]))
    none = acceptance.draw(acceptance.Constant(0.0), traffic.num_output, max_length=5, seed=0)
    assert simulate("none", Cell(gpu, "eagle", traffic, none)).num_steps == 3


def test_requests_are_preempted_and_served_all_the_same_when_room_runs_out() -> None:
    import msgspec

    small = msgspec.structs.replace(profile.load("h100_8b"), kv_tokens=1500)
    traffic = Traffic(np.zeros(8), np.full(8, 200), np.full(8, 300))
    drawn = acceptance.draw(acceptance.Constant(0.7), traffic.num_output, max_length=5, seed=0)
    engine = simulate("static3", Cell(small, "eagle", traffic, drawn))
    assert engine.num_preempted > 0
    assert np.isfinite(engine.served.finished_s).all()
    with pytest.raises(ValueError, match="kv_tokens"):
        huge = Traffic(np.zeros(1), np.array([1500]), np.array([1]))
        simulate("none", Cell(small, "eagle", huge, drawn))


def test_policies_meet_the_same_luck() -> None:
    same = cell(noise=0.0)
    one, other = simulate("static5", same), simulate("clairvoyant", same)
    # Whoever drafts 5 everywhere has every acceptance that the clairvoyant has.
    assert abs(one.num_accepted - other.num_accepted) <= 0.02 * one.num_accepted
    assert other.num_drafted < one.num_drafted


def test_more_load_favours_shorter_lengths() -> None:
    quiet, busy = cell(1.0), cell(400.0, until_s=4.0)
    for at, better, worse in ((quiet, "static5", "none"), (busy, "none", "static5")):
        means = {name: simulate(name, at).served.latency_s.mean() for name in (better, worse)}
        assert means[better] < means[worse]


def test_a_fleet_is_steered_by_one_loop_as_each_engine_alone() -> None:
    cells = [cell(seed=1), cell(seed=2)]
    together = Fleet(cells).run()
    for one, alone in zip(together, (simulate("smartspec", c) for c in cells), strict=True):
        assert np.isfinite(one.served.finished_s).all()
        ratio = one.served.latency_s.mean() / alone.served.latency_s.mean()
        assert ratio == pytest.approx(1.0, abs=0.1)


def test_smartspec_steers_by_policies_over_the_wire() -> None:
    fleet = Fleet([cell()])
    engine = fleet.run()[0]
    stats = fleet.links[0].stats
    assert stats.num_policies > 10 and stats.num_errors == stats.num_bad_frames == 0
    assert stats.num_reports_dropped == 0 and stats.num_reports_sent == engine.num_steps
    assert not any(fleet.loop.counters[f"failures_{w}"] for w in ("deciding", "learning"))


@pytest.mark.parametrize("name", profile.shipped())
def test_profiles_rise_with_work_and_name_their_sources(name: str) -> None:
    gpu = profile.load(name)
    assert gpu.fit_error_mean < 0.05
    labels = {one.label for one in gpu.sources}
    assert labels <= {"measured", "scaled", "extrapolated", "datasheet"}
    base = gpu.target_seconds(8, 8, 4000)
    assert 0.001 < base < 0.2
    assert gpu.target_seconds(64, 64 * 6, 32_000) > base
    assert gpu.target_seconds(8, 8, 40_000) > base
    for draft in ("68m", "160m", "1b", "eagle"):
        cost = gpu.draft(draft)
        assert 0 < cost.per_forward_s < base
    with pytest.raises(ValueError, match="no draft"):
        gpu.draft("7b")


@pytest.mark.parametrize("name", profile.shipped())
def test_passes_beyond_the_source_cost_what_its_last_slope_says(name: str) -> None:
    gpu = profile.load(name)
    last = gpu.dense_tokens[-1]
    slope = (gpu.dense_s[-1] - gpu.dense_s[-2]) / (last - gpu.dense_tokens[-2])
    assert slope > 0
    for beyond in (1, 300, last, 7 * last):
        assert gpu.dense(last + beyond) - gpu.dense(last) == pytest.approx(slope * beyond)
    # Measured tables dip by a few percent here and there; beyond that, twice the tokens is no less.
    assert all(gpu.dense(2 * n) > 0.97 * gpu.dense(n) for n in range(1, 2 * last))
    told = next((one for one in gpu.sources if one.label == "extrapolated"), None)
    assert told.note.startswith(f"passes beyond {last:,}") if told else name == "h100x2_moe"


@pytest.mark.parametrize("low", [8, 600])
def test_a_curve_bends_where_the_table_does_beyond_the_padded_sizes(low: int) -> None:
    gpu = profile.load("h100_8b")
    curve = gpu.curve(low, 2000, (), 2560)
    for tokens in (700, 1024, 1536, 2300, 2560):
        assert float(curve.at(tokens)) == pytest.approx(gpu.target_seconds(low, tokens, 2000))


def test_a_mixture_of_experts_verifies_at_concave_cost() -> None:
    gpu = profile.load("h100x2_moe")
    few = gpu.dense_s[gpu.dense_tokens.index(2)] - gpu.dense_s[gpu.dense_tokens.index(1)]
    more = gpu.dense_s[gpu.dense_tokens.index(8)] - gpu.dense_s[gpu.dense_tokens.index(6)]
    assert few > more / 2 > 0


@pytest.mark.parametrize(
    ("process", "mean"),
    [
        (acceptance.Constant(0.6), 0.6),
        (acceptance.BetaOverRequests(0.7), 0.7),
        (acceptance.Bursty(0.9, 0.3), 0.6),
    ],
)
def test_acceptance_has_its_mean(process: acceptance.Acceptance, mean: float) -> None:
    drawn = acceptance.draw(process, np.full(400, 200), max_length=5, seed=0)
    assert (drawn.run > 0).mean() == pytest.approx(mean, abs=0.03)
    assert drawn.probability.mean() == pytest.approx(mean, abs=0.03)


def test_arrivals_come_at_their_rate() -> None:
    rng = np.random.default_rng(0)
    assert len(arrivals.poisson(10, 500, rng)) == pytest.approx(5000, rel=0.05)
    bursty = np.diff(arrivals.gamma(10, 500, 3.0, rng))
    assert bursty.std() / bursty.mean() == pytest.approx(3.0, rel=0.15)
    phases = arrivals.piecewise([(100, 1.0), (100, 20.0)], rng)
    assert (phases < 100).mean() == pytest.approx(1 / 21, abs=0.02)
    day = arrivals.diurnal(5, 0.9, 1000, rng, day_s=1000)
    assert ((day > 250) & (day < 750)).mean() > 0.7


TRACES = {
    "azure": "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.6805900,396,109\r\n",
    "mooncake": '{"timestamp": 4000, "input_length": 396, "output_length": 109}\n'
    '{"timestamp": 0, "input_length": 374, "output_length": 44, "hash_ids": [1]}\n',
    "servegen": "request_id,timestamp,input_tokens,output_tokens\n0,7.5,374,44\n1,11.5,396,109\n",
}


@pytest.mark.parametrize("name", list(TRACES))
def test_a_trace_is_told_by_its_first_line_and_begins_at_0(name: str, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(TRACES[name], newline="")
    for trace_format in ("auto", name):
        traffic = arrivals.read(path, trace_format)
        assert traffic.arrival_s.tolist() == pytest.approx([0.0, 4.0])
        assert traffic.num_prompt.tolist() == [374, 396]
        assert traffic.num_output.tolist() == [44, 109]
    other = "azure" if name == "servegen" else "servegen"
    with pytest.raises(ValueError, match=f"not a trace of the format {other}"):
        arrivals.read(path, other)


def test_a_trace_is_sped_up_to_the_load_and_sliced(tmp_path: Path) -> None:
    rows = [f"{i * 0.5},100,{20 + i % 3}" for i in range(4000)]
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(["timestamp,input_tokens,output_tokens", *rows]))
    wanted = workload.Workload(trace=str(path), duration_s=5.0, trace_begin_s=100.0)
    traffic = wanted.traffic(0.5, seed=0)
    assert traffic.size == pytest.approx(5.0 * wanted.rate(0.5), rel=0.05)
    assert traffic.arrival_s[-1] < 5.0
    assert traffic.num_output[:3].tolist() == [20 + (200 + i) % 3 for i in range(3)]
    with pytest.raises(ValueError, match="fewer than 2 requests"):
        workload.Workload(trace=str(path), trace_begin_s=1e6).check()


def test_a_trace_that_cannot_fill_its_time_is_refused_before_anything_is_played(
    tmp_path: Path,
) -> None:
    path = tmp_path / "trace.csv"

    def refused(times: list[float], **more: object) -> str:
        rows = [f"{at},100,20" for at in times]
        path.write_text("\n".join(["timestamp,input_tokens,output_tokens", *rows]))
        workload._read.cache_clear()
        wanted = {"trace": str(path), "policies": ("none",), "loads": (0.01, 0.5), **more}
        with pytest.raises(ValueError) as told:
            experiment.check(experiment.Experiment(**wanted))  # type: ignore[arg-type]
        return str(told.value)

    steady = [0.5 * i for i in range(400)]
    words = refused(steady, duration_s=60.0)
    assert "at load 0.5" in words and "duration_s: 60" in words
    lasts_s = float(words.split("lasts ")[1].split(" s")[0])
    workload.Workload(trace=str(path), duration_s=lasts_s).traffic(0.5, seed=0)
    assert "come at once" in refused([3.0] * 40)
    assert "come at once" in refused([0.0, 3.0, 3.0], trace_begin_s=2.0)
    assert "fewer than 2" in refused([0.0, 3.0], trace_begin_s=2.0)


def test_arrivals_of_a_workload_are_as_named() -> None:
    def times(**more: object) -> np.ndarray:
        wanted = workload.Workload(duration_s=400.0, **more)  # type: ignore[arg-type]
        return wanted.traffic(0.5, seed=0).arrival_s

    gaps = {kind: np.diff(times(arrivals=kind)) for kind in ("poisson", "gamma")}
    assert gaps["poisson"].std() / gaps["poisson"].mean() == pytest.approx(1.0, rel=0.1)
    assert gaps["gamma"].std() / gaps["gamma"].mean() == pytest.approx(2.0, rel=0.15)
    day = times(arrivals="diurnal")
    assert ((day > 100) & (day < 300)).mean() > 0.65


@pytest.mark.skipif(not DATA, reason="SMARTSPEC_DATA is not set: no public traces")
def test_public_traces_are_read_whole() -> None:
    azure = arrivals.azure(Path(str(DATA)) / "traces/azure2023_conv.csv")
    assert azure.size == 19_366
    assert azure.arrival_s[-1] == pytest.approx(58 * 60, rel=0.02)
    part = azure.part(slice(100, 200), speed_up=2.0)
    assert part.size == 100 and part.arrival_s[0] == 0
    assert arrivals.mooncake(Path(str(DATA)) / "traces/mooncake_synthetic_trace.jsonl").size == 3993


# -- rivals -------------------------------------------------------------------------------------


def facts(size: int, drafted: int, accepted: int, step_s: float = 0.01) -> StepFacts:
    def column(value: int) -> np.ndarray:
        return np.full(size, value, np.uint8)

    ids = np.arange(size, dtype=np.uint64)
    batch = DecodeBatch(ids, column(7), np.zeros((1, size), np.float32))
    return StepFacts(
        batch, column(drafted), column(accepted), column(accepted + 1), step_s, step_s, 0.0, 100
    )


def test_tiers_follow_batch_and_average() -> None:
    rule = policies.AdaptiveTiers(7)
    assert [rule.at(size) for size in (1, 8, 32, 64)] == [3, 3, 1, 0]
    for _ in range(40):
        rule.report(facts(2, 3, 3))
    assert rule.at(1) == 5  # all of 3 accepted is above 2.5, but not above 4.5
    for _ in range(40):
        rule.report(facts(2, 5, 0))
    assert rule.at(1) == 1


def test_authors_rule_prefers_none_when_drafts_fail_and_length_when_they_do_not() -> None:
    gpu = profile.load("h100_8b")
    for accepted, expected in ((0, {0}), (5, {4, 5})):
        rule = policies.AuthorsRule(gpu, "eagle", 5)
        for _ in range(40):
            rule.report(facts(2, 5, accepted))
        assert rule.at(2) in expected
    slow = policies.AuthorsRule(gpu, "eagle", 5)
    before = [slow.at(2) for _ in range(10)]
    slow.acceptance = 0.0
    assert [slow.at(2) for _ in range(10)] == before and slow.at(2) == 0  # every 20 steps


def test_bandit_tries_all_and_settles_on_the_fastest() -> None:
    rule = policies.Bandit(3)
    rng = np.random.default_rng(0)
    chosen = []
    for _ in range(600):
        rule.length = rule.at(4)
        chosen.append(rule.length)
        rule.report(facts(4, rule.length, rule.length if rule.length < 3 else 0,
                          0.01 * (1 + 0.05 * rng.random())))  # fmt: skip
    assert set(chosen) == {0, 1, 2, 3}
    assert np.bincount(chosen[-200:]).argmax() == 2


def test_switch_off_is_for_ever() -> None:
    rule = policies.SwitchOff(3, threshold=1.0, window=10)
    for _ in range(10):
        rule.report(facts(2, 3, 0))
    assert rule.at(2) == 0
    for _ in range(50):
        rule.report(facts(2, 3, 3))
    assert rule.at(2) == 0


def test_table_falls_with_the_batch_and_with_what_it_is_tuned_for() -> None:
    def lengths(**more: object) -> list[int]:
        table = rival("table", replace(cell(), **more))  # type: ignore[arg-type]
        assert isinstance(table, ListedLengths)
        return [table.at(size) for size in (*range(1, 257), 10_000)]

    usual = lengths()
    assert usual[0] > usual[63] >= usual[255] == usual[-1]
    a100 = {"profile": profile.load("a100_7b"), "draft": "160m"}
    for change in ({"acceptance": 0.5}, {"concentration": 200.0}):
        assert sum(lengths(**a100, **change)) < sum(lengths(**a100)), change
    # Drafts that are there for few fill up a pass less.
    assert sum(lengths(**a100, presence=0.3)) > sum(lengths(**a100))
    # Long contexts make a pass dearer, and a draft's share of it smaller.
    traffic = cell().traffic
    longer = Traffic(traffic.arrival_s, 10 * traffic.num_prompt, traffic.num_output)
    assert sum(lengths(**a100, traffic=longer)) > sum(lengths(**a100))


def test_unknown_names_are_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match="choose of none"):
        rival("best", cell())
    with pytest.raises(ValueError, match="choose of"):
        profile.load("tpu")


# -- experiments --------------------------------------------------------------------------------

DRAFTS = str(Path(__file__).parents[2] / "benchmarks" / "data" / "acceptance.npz")
SMALL = experiment.Experiment(
    policies=("none", "static3", "smartspec"), loads=(0.1,), num_seeds=2, duration_s=5.0
)


def test_experiments_repeat_in_any_number_of_processes() -> None:
    played: list[None] = []
    alone = experiment.play_all(SMALL, 1, lambda: played.append(None))
    assert len(played) == len(alone) == 6
    assert [run.policy for run in alone] == ["none"] * 2 + ["static3"] * 2 + ["smartspec"] * 2
    assert experiment.play_all(SMALL, 2) == alone


def test_a_summary_compares_seed_by_seed_with_the_first_policy() -> None:
    lines = {line.policy: line for line in experiment.summarise(experiment.play_all(SMALL))}
    assert lines["none"].over_first == lines["none"].highest == 1.0
    assert np.isnan(lines["none"].accepted_share)
    assert lines["static3"].lowest <= lines["static3"].over_first <= lines["static3"].highest < 1.0
    assert 0.3 < lines["static3"].accepted_share < 0.9


def test_capacity_is_what_a_full_batch_serves() -> None:
    gpu = profile.load("h100_8b")
    one, many = (workload.capacity(gpu, size, 600, 200) for size in (1, 64))
    assert one == pytest.approx(1 / (200 * gpu.target_seconds(1, 1, 700)), rel=0.7)
    assert 10 * one < many < 64 * one


def test_an_experiment_that_cannot_be_played_says_why(tmp_path: Path) -> None:
    path = tmp_path / "e.toml"
    path.write_text('profile = "h100_8b"\nload = 3\n')
    with pytest.raises(ValueError, match="load"):
        workload.read(path, experiment.Experiment)
    for change, words in (
        ({"policies": ("best",)}, "choose of none"),
        ({"policies": ("none", "static4"), "max_length": 3}, "static4: the longest length is 3"),
        ({"profile": "tpu"}, "no profile"),
        ({"draft": "7b"}, "no draft"),
        ({"drafts": "none.rec"}, "none.rec: No such file"),
        ({"drafts": "none.rec", "trees": True}, "recorded drafts are chains"),
        ({"drafts": DRAFTS, "policies": ("informed",)}, "recorded drafts have none"),
    ):
        with pytest.raises(ValueError, match=words):
            experiment.check(replace_fields(change))


def test_lengths_compared_by_default_are_those_that_there_are(tmp_path: Path) -> None:
    assert experiment.Experiment().policies[:4] == ("none", "static1", "static3", "static5")
    short = experiment.Experiment(max_length=2)
    assert short.policies == ("none", "static1", "static2", "informed", "smartspec")
    (tmp_path / "e.toml").write_text("acceptance = 0.6\n")
    read = workload.read(tmp_path / "e.toml", experiment.Experiment, {"max_length": 2})
    assert (read.policies, read.acceptance) == (short.policies, 0.6)


def test_recorded_drafts_stand_in_place_of_acceptance(tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text(f"drafts = '{DRAFTS}'\nacceptance = 0.6\n")
    with pytest.raises(ValueError, match="drafts: stand in place of acceptance"):
        workload.read(tmp_path / "e.toml", experiment.Experiment)
    (tmp_path / "e.toml").write_text("presence = 0.6\n")
    with pytest.raises(ValueError, match="drafts: stand in place of presence"):
        workload.read(tmp_path / "e.toml", experiment.Experiment, {"drafts": DRAFTS})
    told = workload.made(experiment.Experiment, {"drafts": DRAFTS, "draft": "lookup"})
    assert "informed" not in told.policies and "smartspec" in told.policies
    # Offline tuning is told what the recorded drafts come to.
    cell, seen = told.cell(0.1, seed=0), told.drafts_seen()
    assert (cell.acceptance, cell.concentration, cell.presence) == tuple(seen)
    assert 0.4 < seen.acceptance < 0.8 and 0.1 < seen.presence < 0.5
    model = workload.made(experiment.Experiment, {"drafts": DRAFTS, "draft": "eagle"})
    assert model.drafts_seen().presence == 1.0


def replace_fields(change: dict[str, object]) -> experiment.Experiment:
    import msgspec

    return msgspec.structs.replace(SMALL, **change)


def test_a_profile_without_graphs_bends_where_its_table_does() -> None:
    import msgspec

    gpu = msgspec.structs.replace(profile.load("h100_8b"), graph_sizes=())
    curve = gpu.curve(4, 2000, (), 200)
    for tokens in (4, 24, 100, 200):
        assert float(curve.at(tokens)) == pytest.approx(gpu.target_seconds(4, tokens, 2000))
