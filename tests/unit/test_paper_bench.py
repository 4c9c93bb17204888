"""The paper's evaluation: its grid, warm starts, and what is claimed of made-up numbers."""

from __future__ import annotations

from pathlib import Path

import bench_paper
import msgspec
import paper_grid
import paper_pages
import paper_results
import paper_runs
import pytest
from paper_grid import FULL, Pair, Requests, Setting
from paper_runs import COLD, WARM, Run

from smartspec.engine_adapter.simulator import profile

SETTING = Setting(
    pair_name="h100_8b_eagle",
    traffic_name="short",
    pair=Pair(
        profile="h100_8b", draft="eagle", max_num_running=4, duration_s=0.5, traffic=("short",)
    ),
    requests=Requests(acceptance=0.7, mean_prompt=50, mean_output=20),
    num_seeds=2,
    max_length=2,
    concentration=6.0,
    loads=(0.5, 0.9),
    static_loads=(1.5,),
    rivals=("table",),
)


def test_the_grid_names_only_what_there_is_and_has_five_seeds() -> None:
    settings = paper_grid.read().settings()
    assert len({setting.name for setting in settings}) == len(settings)
    for setting in settings:
        assert setting.num_seeds >= 5
        gpu = profile.load(setting.pair.profile)
        gpu.draft(setting.pair.draft)
        assert setting.pair.max_num_running <= gpu.max_num_running
        # Beyond its last size a profile's table of dense layers is extrapolated.
        most = setting.pair.max_num_running * (1 + setting.longest) + gpu.chunk_tokens
        assert most < gpu.dense_tokens[-1]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("num_seeds = 5", "num_seeds = 1", "num_seeds"),
        ('traffic = ["chat_50"]', 'traffic = ["opera"]', "pairs.a100_7b_68m: no traffic 'opera'"),
        ("max_length = 5", "longest = 5", "longest"),
    ],
)
def test_a_grid_is_refused_by_name_when_something_is_wrong(
    tmp_path: Path, old: str, new: str, words: str
) -> None:
    path = tmp_path / "paper.toml"
    text = paper_grid.PATH.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=words):
        paper_grid.read(path)


def test_a_setting_runs_every_policy_at_every_load_with_every_seed() -> None:
    runs = [run for load in SETTING.all_loads for run in paper_runs.play(SETTING, load)]
    policies = {"none", "static1", "static2", "table", COLD, WARM}
    found = [(run.load, run.policy, run.seed) for run in runs]
    expected = {(load, p, seed) for load in (0.5, 0.9, FULL) for p in policies for seed in (0, 1)}
    expected |= {(1.5, p, seed) for p in SETTING.statics for seed in (0, 1)}
    assert len(found) == len(set(found)) and set(found) == expected
    drafting = {run.policy for run in runs if run.num_drafted}
    assert drafting == policies - {"none"}


def test_a_setting_of_trees_runs_sizes_and_chains_that_meet_the_same_luck() -> None:
    pair = msgspec.structs.replace(SETTING.pair, tree_sizes=(2, 6))
    setting = msgspec.structs.replace(SETTING, pair=pair, tree_rivals=("informed",))
    runs = {run.policy: run for run in paper_runs.play(setting, 0.9) if run.seed == 0}
    chains = {"chain1", "chain2"}
    assert set(runs) == {"none", "static2", "static6", "informed", COLD, WARM} | chains
    cell = paper_runs.make_cell(setting, 0.9, 0)
    assert cell.outcomes.trees is not None and cell.max_length == 6
    # A tree of two holds at least what a chain of two does.
    assert runs["static2"].num_accepted >= 0.95 * runs["chain2"].num_accepted > 0
    assert runs["chain1"].num_drafted < runs["static2"].num_drafted < runs["static6"].num_drafted


def test_a_warm_run_goes_on_from_what_another_seed_has_learned() -> None:
    first, second = (paper_runs.make_cell(SETTING, 0.9, seed) for seed in (0, 1))
    assert first.traffic.num_output.tolist() != second.traffic.num_output.tolist()
    _, learned = paper_runs.steer(second)
    engine, after = paper_runs.steer(first, learned)
    assert after.num_steps == pytest.approx(learned.num_steps + engine.num_steps, abs=40)
    assert engine.num_steps > 20


def made_up(latency: dict[tuple[float, str], float]) -> list[Run]:
    """Two seeds, the second with latencies (and rates) twice the first's."""
    return [
        Run(
            load=load,
            policy=policy,
            seed=seed,
            num_requests=1,
            latency_s=value * (1 + seed),
            time_to_first_s=0.1,
            served_per_s=value * (1 + seed),
            num_steps=1,
            num_drafted=0,
            num_accepted=0,
        )
        for (load, policy), value in latency.items()
        for seed in (1, 0)
    ]


def result(quiet: float, busy: float, full: float) -> paper_results.Result:
    """Warm SmartSpec has these latencies (and rate); static1 has 1, and none 4, 2 and 0.5."""
    setting = msgspec.structs.replace(SETTING, traffic_name=f"t{quiet:g}")
    latency = {}
    for load, none, warm in ((0.5, 4.0, quiet), (0.9, 2.0, busy), (FULL, 0.5, full)):
        latency |= {(load, "none"): none, (load, "static1"): 1.0, (load, "static2"): 1.5}
        latency |= {(load, WARM): warm, (load, COLD): 2 * warm, (load, "table"): 1.1}
    latency[FULL, "static2"] = 0.9
    latency |= {(1.5, "none"): 1.0, (1.5, "static1"): 2.0, (1.5, "static2"): 3.0}
    return paper_results.of(setting, made_up(latency))


def test_figures_are_of_the_worst_and_the_best_cells() -> None:
    figures = paper_results.figures([result(0.9, 2.0, 1.1), result(1.25, 0.4, 0.95)])
    assert figures["num_cells"] == 4 and figures["num_cells_up_to_0.8"] == 2
    # 2.0 at load 0.9 is worse, but beyond the loads at which every cell counts.
    assert figures["worst_cell_vs_best_static"] == pytest.approx(1.25)
    assert figures["worst_cell_vs_best_static_upper95"] == pytest.approx(1.25)
    assert figures["worst_cell_vs_none"] == pytest.approx(1.25 / 4)
    assert figures["worst_capacity_vs_best_static"] == pytest.approx(0.95)
    assert figures["best_cell_speedup"] == pytest.approx(2.0 / 0.4)
    assert figures["cold_worst_cell_vs_best_static"] == pytest.approx(2.5)
    assert figures["num_cells_missed"] == figures["num_capacities_missed"] == 1


def test_what_has_not_been_run_is_left_out(tmp_path: Path) -> None:
    whole = result(0.9, 2.0, 1.1)
    runs = made_up({(0.5, policy): 1.0 for policy in (*SETTING.statics, "table", COLD, WARM)})
    part = paper_results.of(SETTING, runs)
    assert [cell.load for cell in part.cells] == [0.5] and part.full is None
    figures = paper_results.figures([whole, part])
    assert figures["num_cells"] == 3 and figures["num_capacities"] == 1
    assert "worst_capacity_vs_best_static" not in paper_results.figures([part])
    paper_pages.write([whole, part], tmp_path, shown=("table", COLD, WARM))
    assert "| h100_8b_eagle.short | 0 |  |  |" in (tmp_path / "tables.md").read_text()


def test_misses_are_named_with_what_they_miss_by() -> None:
    found = paper_results.misses([result(0.9, 2.0, 1.1), result(1.25, 0.4, 0.95)])
    assert set(found) == {"h100_8b_eagle.t1.25@0.5", "h100_8b_eagle.t1.25, full queue"}
    assert "1.250 of static1" in found["h100_8b_eagle.t1.25@0.5"]
    assert paper_results.misses([result(1.02 - 1e-9, 2.0, 0.99 + 1e-9)]) == {}


def test_tables_and_pictures_show_every_cell(tmp_path: Path) -> None:
    results = [result(0.9, 2.0, 1.1), result(1.25, 0.4, 0.95)]
    assert results[0].best_static == {0.5: "static1", 0.9: "static1", 1.5: "none"}
    paper_pages.write(results, tmp_path, shown=("table", COLD, WARM))
    text = (tmp_path / "tables.md").read_text()
    assert (
        "| t1.25 | 0.5 | 6.00 s | 1.50 s (1) | 1.100 | 2.500 | **1.250** | 1.250 | 3.20 |" in text
    )
    assert "| t0.9 | full | 0.8/s | 1.5/s (1) | 1.100 | 2.200 | 1.100 |  | 2.20 |" in text
    assert "| h100_8b_eagle.t0.9 | 1 | 1 | 0 |" in text
    for name in ("paper_latency.png", "paper_speedup.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_table_of_trees_names_the_best_chain(tmp_path: Path) -> None:
    pair = msgspec.structs.replace(SETTING.pair, tree_sizes=(2, 6))
    setting = msgspec.structs.replace(SETTING, pair=pair, tree_rivals=("informed",))
    latency = {}
    for load, of_chains in ((0.5, (1.3, 1.1)), (FULL, (1.3, 1.1))):
        latency |= {(load, "none"): 2.0, (load, "static2"): 1.0, (load, "static6"): 1.2}
        latency |= {(load, "chain1"): of_chains[0], (load, "chain2"): of_chains[1]}
        latency |= {(load, "informed"): 0.8, (load, COLD): 1.0, (load, WARM): 0.9}
    paper_pages.write([paper_results.of(setting, made_up(latency))], tmp_path)
    lines = (tmp_path / "tables.md").read_text().splitlines()
    assert lines[2].startswith("| traffic | load | none | best static | best chain | informed |")
    assert "| short | 0.5 | 3.00 s | 1.50 s (2) | 1.100 (2) | 0.800 | 1.000 | 0.900 |" in lines[4]
    full = "| short | full | 3.0/s | 3.0/s (0) | 0.650 (1) | 0.400 | 0.500 | **0.450** |"
    assert full in lines[5]


def test_runs_are_kept_for_the_same_setting_and_code_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_paper, "FOLDER", tmp_path / "paper")
    runs = made_up({(0.5, "none"): 1.0})
    job = (SETTING, 0.5)
    assert bench_paper.kept(job, "a") is None
    bench_paper.keep(job, "a", runs)
    assert bench_paper.kept(job, "a") == bench_paper.kept(job, None) == tuple(runs)
    assert bench_paper.kept(job, "b") is None
    assert bench_paper.kept((SETTING, 0.9), None) is None
    assert bench_paper.kept((msgspec.structs.replace(SETTING, max_length=3), 0.5), None) is None
