"""What the demonstration says of what it measured."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from virtual_engine import VirtualEngine

from smartspec.lab.demo import live, plots, run, summary
from smartspec.lab.demo.arms import ARMS, Arm, named
from smartspec.lab.demo.calibration import Calibration
from smartspec.lab.demo.player import Play, Played, RequestRecord, StepRecord
from smartspec.lab.demo.schedule import build, load_prompts
from smartspec.lab.demo.session import ArmPlayed


def request(
    name: str, phase: str, arrived_s: float, latency_s: float, num_tokens: int = 11, text: str = "x"
) -> RequestRecord:
    return RequestRecord(
        id=name,
        kind="chat",
        phase=phase,
        arrived_s=arrived_s,
        first_token_s=arrived_s + latency_s / 2,
        finished_s=arrived_s + latency_s,
        num_tokens=num_tokens,
        text=text,
    )


def arm(quiet_s: float, busy_s: float, text: str = "x") -> list[RequestRecord]:
    return [
        request("a", "quiet", 0.0, quiet_s, text=text),
        request("b", "quiet", 1.0, quiet_s),
        request("c", "busy", 2.0, busy_s),
    ]


@pytest.fixture
def arms() -> dict[str, list[RequestRecord]]:
    return {"none": arm(2.0, 8.0), "static_3": arm(1.0, 10.0), "smartspec": arm(1.1, 6.0)}


def test_figures_are_right_when_worked_out_by_hand() -> None:
    stats = summary.stats_of([request("a", "q", 0.0, 2.0, 11), request("b", "q", 1.0, 4.0, 21)])
    assert stats.num_requests == 2
    assert stats.latency_mean_s == pytest.approx(3.0)
    assert stats.latency_p50_s == pytest.approx(3.0)
    assert stats.latency_p99_s == pytest.approx(3.98)
    assert stats.ttft_mean_s == pytest.approx(1.5)
    assert stats.tpot_mean_s == pytest.approx((1.0 / 10 + 2.0 / 20) / 2)
    assert stats.goodput_tokens_per_s == pytest.approx(32 / 5)


def test_requests_count_to_their_arrival_when_answered_in_a_later_phase() -> None:
    phases = summary.by_phase([request("a", "busy", 0.0, 50.0), request("b", "quiet", 10.0, 1.0)])
    assert phases["busy"].latency_mean_s == pytest.approx(50.0)
    assert phases["quiet"].latency_mean_s == pytest.approx(1.0)


def test_best_other_is_chosen_per_phase_when_compared(arms: dict[str, list[RequestRecord]]) -> None:
    quiet, busy, overall = summary.compare(arms)
    assert (quiet.group, quiet.best_other, quiet.ratio) == ("quiet", "static_3", pytest.approx(1.1))
    assert (busy.group, busy.best_other, busy.ratio) == ("busy", "none", pytest.approx(0.75))
    assert (overall.group, overall.best_other) == ("overall", "none")


def test_sentence_says_slower_when_smartspec_lost(arms: dict[str, list[RequestRecord]]) -> None:
    quiet, busy, _ = map(str, summary.compare(arms))
    assert quiet == (
        "In the phase 'quiet', SmartSpec was slower than the best other, static_3: "
        "mean latency 10% higher."
    )
    assert busy == (
        "In the phase 'busy', SmartSpec was faster than the best other, none: "
        "mean latency 25% lower."
    )


def test_nothing_is_compared_when_smartspec_was_left_out() -> None:
    assert summary.compare({"none": arm(1.0, 1.0)}) == []
    assert summary.compare({"smartspec": arm(1.0, 1.0)}) == []


def test_differing_answer_is_named_when_an_arm_says_something_else() -> None:
    answers = summary.compare_answers(
        {"none": arm(1, 1), "static_3": arm(1, 1, text="other"), "smartspec": arm(1, 1)}
    )
    assert (answers.num_compared, answers.num_identical) == (3, 2)
    assert answers.different == {"a": ["static_3"]}


def test_report_holds_what_was_measured_when_written(
    arms: dict[str, list[RequestRecord]], tmp_path: Path
) -> None:
    steps = [StepRecord(0.1 * i, (i % 4, 3), 2, i % 3, 0.1, 0, "policy") for i in range(60)]
    played = [
        ArmPlayed(one, Played(requests=arms[one.name], steps=steps)) for one in named(list(arms))
    ]
    schedule = build(load_prompts(), 2.5, seed=0)
    console = Console(record=True, width=140, force_terminal=False)
    run.report(tmp_path, played, schedule, {"seed": 5}, console)

    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["seed"] == 5
    assert list(written["arms"]) == ["none", "static_3", "smartspec"]
    overall = written["arms"]["smartspec"]["overall"]
    assert set(overall) == {
        "num_requests", "latency_mean_s", "latency_p50_s", "latency_p99_s",
        "ttft_mean_s", "tpot_mean_s", "goodput_tokens_per_s",
    }  # fmt: skip
    assert overall["latency_mean_s"] == pytest.approx((1.1 + 1.1 + 6.0) / 3)
    assert set(written["arms"]["none"]["phases"]) == {"quiet", "busy"}
    lines = (tmp_path / "requests.jsonl").read_text().splitlines()
    assert len(lines) == 9
    assert json.loads(lines[0])["arm"] == "none"
    for name in ("lengths.png", "latencies.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    shown = console.export_text()
    assert "10% higher" in shown
    assert "3 of 3 answers are identical" in shown


def test_plot_is_drawn_when_nothing_was_decoded(tmp_path: Path) -> None:
    schedule = build(load_prompts(), 2.5, seed=0)
    plots.lengths_over_time(Played(), schedule, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0


def view(title: str, steps: list[StepRecord], why: str, steered: bool = False) -> live.View:
    """After 10 s of the demonstration's schedule."""
    now = iter([0.0])
    schedule = build(load_prompts(), 2.5, seed=0)
    playing = Play(schedule.arrivals, VirtualEngine(), tag="t", clock=lambda: next(now, 10.0))
    playing.played.requests += arm(1, 1)
    playing.played.steps += steps
    playing.played.num_tokens, playing.played.num_finished = 500, 2
    return live.view_of(playing, schedule, title, why, steered)


def test_view_tells_load_lengths_and_reason_when_shown() -> None:
    steps = [
        StepRecord(1.0, (5, 5), 2, 0, 0.1, 0, "policy"),
        StepRecord(9.5, (0, 3, 3, 3), 4, 7, 0.1, 0, "policy"),
    ]
    steered = view("SmartSpec", steps, "costs too much", steered=True)
    line = live.line_of("1/6, ", steered)
    for part in (
        "1/6, SmartSpec",
        "quiet",
        "4 running, 7 waiting",
        "2/72",
        "0:25% 3:75%",
        "50 tok/s",
        "costs too much",
    ):
        assert part in line
    console = Console(record=True, width=120)
    console.print(live.panel_of("1/6, ", [steered, view("none", [], "set to 0")], place=1))
    panel = console.export_text()
    for part in ("1/6, ", "quiet", "none", "2 of 72", "costs too much", "0" * 6 + "3" * 18):
        assert part in panel
    assert "set to 0" not in panel


def test_lines_are_plain_and_few_when_not_a_terminal(tmp_path: Path) -> None:
    now = [0.0]
    views = [view("none", [], "[never]"), view("SmartSpec", [], "[why]")]
    with (tmp_path / "out").open("w+") as file:
        display = live.Display(Console(file=file, width=300), clock=lambda: now[0])
        with display:
            for tick in range(100):
                now[0] = tick / 10
                if display.due:
                    display.show("", views, 1)
        file.seek(0)
        lines = file.read().splitlines()
    assert len(lines) == 2
    assert all("[why]" in line and "\x1b" not in line for line in lines)


@pytest.mark.parametrize(("gigabytes", "num_groups"), [(10.0, 1), (8.0, 4)])
def test_arms_are_played_one_after_the_other_when_memory_is_short(
    gigabytes: float, num_groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SimpleNamespace(available=gigabytes * 1e9)
    monkeypatch.setattr(run.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(run.free_bytes, "__defaults__", (Path("/nowhere"),))
    console = Console(record=True, width=200)
    assert run.groups(ARMS[:1], console) == [[ARMS[0]]]
    assert console.export_text() == ""
    found = run.groups(ARMS, console)
    assert len(found) == num_groups
    assert [one for group in found for one in group] == list(ARMS)
    said = console.export_text()
    assert ("8.0 GB of memory are free" in said) == (num_groups == 4)
    assert ("take turns of 2 s" in said) == (num_groups == 1)


def test_memory_is_that_of_the_container_when_it_has_less(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    everything = run.free_bytes(limit)
    assert everything > 1e6
    limit.write_text("1000000\n")
    assert run.free_bytes(limit) == 1_000_000
    limit.write_text("max\n")
    assert run.free_bytes(limit) > 1e6


class Sessions:
    """Stands for `Session`: notes which arms are together."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.ready = dict.fromkeys(("model", "dtype", "device", "proposer", "max_length"), "x")

    def __call__(self, out: Path, display: live.Display, arms: list[Arm]) -> Sessions:
        self._arms = arms
        self.groups.append([one.name for one in arms])
        return self

    def __enter__(self) -> Sessions:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def calibrate(self, prompts: object, seed: int) -> Calibration:
        return Calibration(2.0, 100.0, 24, 50.0, 60.0, 0.1, 0.05)

    def play(self, schedule: object, warm_up: object, seed: int) -> list[ArmPlayed]:
        return [ArmPlayed(one, Played(requests=arm(1.0, 2.0))) for one in self._arms]


@pytest.mark.parametrize("by_turns", [True, False])
def test_all_arms_are_compared_however_they_were_played(
    by_turns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = Sessions()
    monkeypatch.setattr(run, "Session", sessions)
    monkeypatch.setattr(run, "free_bytes", lambda: 1e12 if by_turns else 1.0)
    run.run(tmp_path, ARMS, 0, False, Console(record=True, width=200))
    names = [one.name for one in ARMS]
    assert sessions.groups == ([names] if by_turns else [[name] for name in names])
    written = json.loads((tmp_path / "summary.json").read_text())
    assert list(written["arms"]) == names
    assert written["by_turns"] is by_turns


def test_arms_are_refused_when_unknown() -> None:
    assert [one.name for one in named(["smartspec", "none", "none"])] == ["smartspec", "none"]
    assert [one.name for one in ARMS] == ["none", "static_3", "static_5", "smartspec"]
    with pytest.raises(ValueError, match="static_9"):
        named(["static_9"])


def test_exit_code_is_usage_when_an_arm_is_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(tmp_path, ["nonsense"]) == run.EXIT_USAGE
    assert "nonsense" in capsys.readouterr().err
