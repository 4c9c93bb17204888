"""What `smartspec simulate` shows: timelines, pictures, one page that needs nothing else."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from smartspec.daemon.cli import app
from smartspec.lab.simulation import experiment, page, plots, report
from smartspec.lab.simulation.experiment import Experiment, Run, interval
from smartspec.lab.simulation.timeline import NUM_BINS

TRACES = str(Path(__file__).parents[2] / "benchmarks" / "data" / "acceptance.npz")
SMALL = Experiment(
    policies=("none", "static3", "smartspec"), loads=(0.1, 0.4), num_seeds=3, duration_s=4.0
)


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return experiment.play_all(SMALL, watched=True)


def test_a_timeline_adds_up_to_the_run(runs: list[Run]) -> None:
    assert [run.timeline is not None for run in runs] == [run.seed == 0 for run in runs]
    for run in runs:
        if (timeline := run.timeline) is None:
            continue
        assert timeline.bin_s == pytest.approx(SMALL.duration_s / NUM_BINS)
        assert sum(timeline.latency_sum_s) == pytest.approx(run.latency_mean_s * run.num_requests)
        share = np.array(timeline.length_share)
        assert np.nansum(share, axis=1) == pytest.approx(np.isfinite(share[:, 0]).astype(float))
        always = {"none": 0, "static3": 3}.get(run.policy)
        if always is not None:
            assert np.nanmin(share[:, always]) == 1.0
        assert np.isfinite(timeline.predicted_goodput).any() == (run.policy == "smartspec")


def test_a_watched_run_is_the_same_as_one_that_is_not(runs: list[Run]) -> None:
    alone = experiment.play(SMALL, "smartspec", 0.4, 0)
    watched = next(r for r in runs if (r.policy, r.load, r.seed) == ("smartspec", 0.4, 0))
    assert msgspec.structs.replace(watched, timeline=None) == alone


def test_an_interval_wants_three_values_and_narrows_with_more() -> None:
    assert math.isnan(interval([1.0, 2.0])[1])
    few, many = interval([1.0, 2.0, 3.0]), interval([1.0, 2.0, 3.0] * 4)
    assert few[0] == many[0] == 2.0
    assert few[1] < many[1] < 2.0 < many[2] < few[2]


def test_the_report_is_one_file_that_needs_nothing_else(runs: list[Run], tmp_path: Path) -> None:
    lines = experiment.summarise(runs)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        report.write(SMALL, lines, runs, tmp_path / name)
    names = {path.name for path in (tmp_path / "first").iterdir()}
    pictures = {"latency.png", "lengths.png", "goodput.png", "gain.png"}
    assert names == pictures | {"report.html", "results.json"}
    for name in names:  # the same bytes, pictures too
        same = [(tmp_path / folder / name).read_bytes() for folder in ("first", "second")]
        assert same[0] == same[1], name
    text = (tmp_path / "first" / "report.html").read_text()
    assert text.count("data:image/svg+xml;base64,") == len(pictures)
    assert "<script" not in text
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:)[\w/.]*//""", text)
    for run in runs:
        assert f"</i>{run.policy}</td>" in text
    for line in lines:
        assert f"{line.latency_mean_s:.3f} s" in text
    for label in ("measured", "datasheet"):
        assert f"'tag {label}'" in text


def test_what_a_user_names_is_text_in_the_page(runs: list[Run], tmp_path: Path) -> None:
    path = tmp_path / "<b>&.csv"
    path.write_text("timestamp,input_tokens,output_tokens\n0,9,9\n1,9,9\n")
    lines = experiment.summarise(runs)
    named = msgspec.structs.replace(SMALL, trace=str(path))
    text = page.render(named, lines, {"latency": plots.latency(SMALL, lines)}, runs)
    assert "<b>&" not in text and "&lt;b&gt;&amp;" in text


def test_the_page_names_what_drafts_came_from(runs: list[Run]) -> None:
    lines = experiment.summarise(runs)
    figures = {"latency": Figure()}
    drawn = page.render(SMALL, lines, figures, runs)
    assert "mean acceptance 0.7" in drawn and "<code>acceptance</code>" in drawn
    recorded = msgspec.structs.replace(SMALL, drafts="<a>/monday.rec")
    told = page.render(recorded, lines, figures, runs)
    assert "drafts as in monday.rec" in told and "monday.rec (set)" in told
    assert "acceptance 0.7" not in told and "<code>acceptance</code>" not in told
    assert "<a>" not in told


def test_pictures_of_goodput_need_a_daemon(runs: list[Run]) -> None:
    fixed = msgspec.structs.replace(SMALL, policies=("none", "static3"))
    some = [run for run in runs if run.policy != "smartspec"]
    assert set(plots.draw(fixed, experiment.summarise(some), some)) == {
        "latency",
        "lengths",
        "gain",
    }


def test_findings_name_the_best_fixed_length(runs: list[Run]) -> None:
    first, second = page.findings(SMALL, experiment.summarise(runs))
    assert re.search(r"against none: \d+% less at load 0.1, \d+% less at load 0.4", first)
    assert "static3 at 0.1 (" in second


def test_simulate_writes_a_report_and_prints_json(tmp_path: Path) -> None:
    flags = ["--policies", "none,static3", "--loads", "0.2", "--duration-s", "2"]
    more = ["--num-seeds", "1", "--num-workers", "1", "--out", str(tmp_path / "o"), "--json"]
    done = CliRunner().invoke(app, ["simulate", *flags, *more])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [run["policy"] for run in told["runs"]] == ["none", "static3"]
    assert not any("timeline" in run for run in told["runs"])
    assert all(
        "timeline" in r for r in json.loads((tmp_path / "o/results.json").read_text())["runs"]
    )


def test_simulate_tells_how_well_recorded_drafts_cover_what_is_asked() -> None:
    asked = ["simulate", "--draft", "lookup", "--drafts", TRACES, "--policies", "none,static3"]
    done = CliRunner().invoke(
        app, [*asked, "--loads", "0.1", "--duration-s", "3", "--num-workers", "1"]
    )
    assert done.exit_code == 0, done.output
    assert "as in acceptance.npz" in " ".join(done.stdout.split())
    assert "of 960 recorded answers of 5 to 96 tokens" in done.stdout
    wanted = Experiment(draft="lookup", drafts=TRACES, loads=(0.1,), duration_s=3.0)
    share = (wanted.traffic(0.1, seed=0).num_output > 96).mean()
    assert 0 < share < 1
    assert f"{share:.0%} of the requests are longer than any" in done.stdout


def test_simulate_refuses_in_one_line(tmp_path: Path) -> None:
    for flags, words in (
        (["--trace", str(tmp_path / "none.csv")], "none.csv"),
        (["--arrivals", "tidal"], "arrivals"),
        (["--loads", "x"], "--loads x: expected numbers"),
        (["--acceptance", "1.5"], "acceptance"),
    ):
        done = CliRunner().invoke(app, ["simulate", "--num-workers", "1", *flags])
        assert done.exit_code == 2
        assert words in done.stderr and len(done.stderr.splitlines()) == 1
