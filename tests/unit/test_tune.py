"""Profiles of one's own engine, and the static table that engines without a sidecar want."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import learned_state
import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from smartspec.daemon.cli import app
from smartspec.daemon.event_bus import FrameEvent
from smartspec.daemon.recording import Writer
from smartspec.daemon.state import learned
from smartspec.engine_adapter.simulator import profile
from smartspec.lab.profiles import observed
from smartspec.lab.simulation import static_table, tune
from smartspec.lab.simulation.static_table import Entry
from smartspec.lab.simulation.tune import Tuning
from smartspec.lab.simulation.workload import Workload, made
from smartspec.lab.simulation.world import Fleet, simulate

TRACES = str(Path(__file__).parents[2] / "benchmarks" / "data" / "acceptance.npz")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def fleet(workload: Workload, load: float) -> tuple[Fleet, list[FrameEvent]]:
    """An engine under SmartSpec that has served, and what it has said."""
    made = Fleet([workload.cell(load, seed=5)])
    frames: list[FrameEvent] = []
    receive = made._wire.receive

    def listening() -> tuple[bytes, bytes] | None:
        got = receive()
        if got is not None:
            at_s = made._queue.now_s
            frames.append(FrameEvent(turn=0, at_s=at_s, peer=got[0], inbound=True, frame=got[1]))
        return got

    made._wire.receive = listening  # type: ignore[method-assign]
    made.run()
    return made, frames


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    _, frames = fleet(Workload(profile="a100_7b", draft="160m", duration_s=12.0), 0.5)
    path = tmp_path_factory.mktemp("recorded") / "a.rec"
    writer = Writer(path, 0.0)
    for event in frames:
        writer.add(event)
    writer.close()
    return path


# -- profiles -----------------------------------------------------------------------------------


def test_a_profile_of_reports_serves_as_the_engine_did(recording: Path) -> None:
    seen = observed.of_recording(recording)["engine-0"]
    made = observed.fit(seen, "mine")
    assert made.fit_error_mean < 0.05
    assert {one.label for one in made.sources} <= {"measured", "scaled"}
    workload = Workload(profile="a100_7b", draft="160m", duration_s=15.0)
    cell = workload.cell(0.5, seed=9)
    for policy in ("none", "static3"):
        real = simulate(policy, cell).served.latency_s.mean()
        ours = simulate(policy, replace(cell, profile=made, draft="own")).served.latency_s.mean()
        assert ours == pytest.approx(real, rel=0.08), policy


def test_acceptance_seen_is_that_of_the_requests(recording: Path) -> None:
    found = observed.of_recording(recording)["engine-0"].acceptance()
    assert found is not None
    assert found.acceptance == pytest.approx(0.7, abs=0.06)
    assert 3.0 < found.concentration < 14.0
    assert found.presence == 1.0


def test_too_few_steps_make_no_profile(recording: Path) -> None:
    seen = observed.of_recording(recording)["engine-0"]
    short = replace(seen, steps=seen.steps[:10])
    with pytest.raises(ValueError, match="10 steps: at least"):
        observed.fit(short, "mine")


def test_profile_is_written_for_simulate(recording: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.json"
    done = invoke("profile", str(recording), "--out", str(out))
    assert done.exit_code == 0, done.output
    assert profile.load(out).name == "mine"
    assert f"--profile {out} --draft own" in done.stdout.replace("\n", " ")
    # SmartSpec has drafted its longest where that is known to pay, and little else is open.
    assert f"--drafts {recording} in place of --acceptance" in done.stdout
    told = json.loads(invoke("profile", str(recording), "--json").stdout)
    assert told["profile"]["drafts"]["own"]["forward_s"] > 0
    assert 0 < told["acceptance"]["acceptance"] < 1


def test_profile_says_what_is_wrong(recording: Path, tmp_path: Path) -> None:
    other = tmp_path / "x.rec"
    other.write_bytes(b"nothing")
    for arguments, words in (
        ([str(other)], "not a recording"),
        ([str(tmp_path / "none.rec")], "No such file"),
        ([str(recording), "--engine", "gpu7"], "no engine 'gpu7' in it: engine-0"),
    ):
        done = invoke("profile", *arguments)
        assert done.exit_code == 2 and words in done.stderr


def test_a_profile_of_learned_state_costs_what_the_model_says() -> None:
    made, _ = fleet(Workload(duration_s=8.0), 0.4)
    [event] = made.loop.checkpoints()
    models = learned.restore(learned.decode(event.frame))
    gpu = observed.fit(observed.of_learned(models, 64), "learned")
    from smartspec.estimators.step_cost import StepShape

    for size, length, context in ((4, 0, 3000), (16, 3, 12_000), (32, 5, 25_000)):
        n = size * (1 + length)
        wanted = float(models.step_cost.target_curve(StepShape(size, n, 0, context), [n])[0])
        assert gpu.target_seconds(size, n, context) == pytest.approx(wanted, rel=0.05)
    found = observed.acceptance_of_learned(models)
    assert found.acceptance == pytest.approx(0.66, abs=0.12)


# -- tables -------------------------------------------------------------------------------------

TABLE = (Entry(1, 8, 5), Entry(9, 40, 2), Entry(41, 64, 0))


def test_tables_are_in_each_engines_form() -> None:
    assert tune.as_vllm(TABLE) == {
        "num_speculative_tokens": 5,
        "num_speculative_tokens_per_batch_size": [[1, 8, 5], [9, 40, 2], [41, 64, 0]],
    }
    assert tune.as_tensorrt_llm(TABLE) == {
        "max_draft_len": 5,
        "draft_len_schedule": {"8": 5, "40": 2},  # beyond the last: none
    }
    assert tune.as_sglang(TABLE) == {"1": [5], "9": [2], "41": [0]}
    rule = static_table.ListedLengths(TABLE)
    assert [rule.at(size) for size in (1, 8, 9, 40, 41, 64, 900)] == [5, 5, 2, 2, 0, 0, 0]


def test_no_entry_drafts_where_drafts_are_worthless() -> None:
    _, on = tune.ground(Tuning(acceptance=0.01, concentration=50.0, draft="1b"))
    assert on.table(64) == (Entry(1, 64, 0),)
    assert tune.as_tensorrt_llm(on.table(64))["draft_len_schedule"] == {}


def test_a_table_covers_every_batch_and_stays_near_the_best() -> None:
    _, on = tune.ground(Tuning())
    entries = on.table(128)
    assert [e.low for e in entries] == [1, *(e.high + 1 for e in entries[:-1])]
    assert entries[-1].high == 128 and entries[0].length > entries[-1].length
    rule = static_table.ListedLengths(entries)
    for size in range(1, 129):
        by_length = on.goodput(size)
        assert by_length[rule.at(size)] >= (1 - static_table.WITHIN) * by_length.max()


def test_survival_of_a_beta_is_its_moments() -> None:
    drawn = np.random.default_rng(0).beta(0.7 * 6, 0.3 * 6, 200_000)
    wanted = [float((drawn**j).mean()) for j in (1, 2, 3)]
    assert static_table.beta_survival(0.7, 6.0, 3) == pytest.approx(wanted, rel=0.01)


def test_tune_tells_what_the_table_gives_up() -> None:
    flags = ["--profile", "a100_7b", "--draft", "160m", "--loads", "0.3", "--duration-s", "4"]
    done = invoke("tune", *flags, "--num-seeds", "3", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)["tuned"]
    [at] = told["comparisons"]
    assert at["over_live_low"] <= at["over_live"] <= at["over_live_high"]
    assert 0.9 < at["over_live"] < 1.2 and at["over_none"] < 1.0
    assert told["table"][0]["low"] == 1
    words = invoke("tune", *flags, "--num-seeds", "1").stdout
    for name in ("num_speculative_tokens_per_batch_size", "draft_len_schedule", "SGLang"):
        assert name in words


def test_tune_fits_to_recorded_drafts_and_plays_them() -> None:
    few = {"profile": "a100_7b", "loads": (0.2,), "num_seeds": 1, "duration_s": 4.0}
    tuning = made(Tuning, few | {"draft": "lookup", "drafts": TRACES})
    on = tune.ground(tuning)[1]
    seen = tuning.drafts_seen()
    assert on.presence == seen.presence < 1
    assert on.survival[0] == pytest.approx(seen.acceptance)
    found = tune.tune(tuning)
    assert found.comparisons[0].over_none < 0.9
    with pytest.raises(ValueError, match="leave out drafts, or state"):
        tune.ground(made(Tuning, {"state": "x", "drafts": TRACES}))


def test_tune_reads_learned_state(tmp_path: Path) -> None:
    path = tmp_path / f"{learned_state.CHECKPOINT.key.id}.state"
    path.write_bytes(learned_state.FRAME)
    for state in (path, tmp_path):
        wanted = Tuning(state=str(state), max_num_running=16)
        tuning, on = tune.ground(wanted)
        survival = np.cumprod(learned_state.ENGINE.learned.acceptance.pooled_hazards())
        assert on.survival == pytest.approx(survival[: len(on.survival)])
        assert on.table(16)[-1].high == 16
        assert math.isfinite(tuning.rate(0.5))
    path.write_bytes(b"x")
    for state in (path, tmp_path / "empty"):
        done = invoke("tune", "--state", str(state))
        assert done.exit_code == 2 and len(done.stderr.strip().splitlines()) == 1


def test_tune_refuses_what_was_learned_of_trees(tmp_path: Path) -> None:
    key = msgspec.structs.replace(learned_state.CHECKPOINT.key, trees=True)
    path = tmp_path / "trees.state"
    path.write_bytes(learned.encode(learned.Learned.new(key).checkpoint()))
    with pytest.raises(ValueError, match="a table is fitted to chains"):
        tune.ground(Tuning(state=str(path)))


def test_same_tuning_says_the_same() -> None:
    wanted = Tuning(loads=(0.3,), num_seeds=1, duration_s=2.0)
    first, second = (msgspec.json.encode(tune.tune(wanted)) for _ in range(2))
    assert first == second
