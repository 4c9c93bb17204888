"""From runs to what is claimed: ratios paired over seeds, the worst cells, and those that miss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from paired import Ratio, paired_ratio
from paper_grid import FULL, Setting
from paper_runs import COLD, WARM, Run

RULED_UP_TO = 0.8  #: the load up to which every cell is to be near the best
SPEEDUP_UP_TO = 0.9
NEAR = 1.02  #: of the best static length, and of none
CAPACITY_NEAR = 0.99


class CellResult(NamedTuple):
    """A setting at a load. Ratios are of mean latency, paired by seed: less than 1 is better."""

    name: str
    load: float
    latency_s: dict[str, float]  #: mean over seeds, by policy
    best_static: str  #: in hindsight: the lowest mean over seeds
    vs_best_static: dict[str, Ratio]  #: by policy
    vs_none: dict[str, Ratio]

    @property
    def misses(self) -> bool:
        """Whether warm SmartSpec is further off than is asked at this load."""
        worst = max(self.vs_best_static[WARM].value, self.vs_none[WARM].value)
        return self.load <= RULED_UP_TO and worst > NEAR


class CapacityResult(NamedTuple):
    """What a setting serves with a full queue. Ratios are of rates: more than 1 is better."""

    served_per_s: dict[str, float]  #: requests; mean over seeds, by policy
    best_static: str
    vs_best_static: dict[str, Ratio]

    @property
    def misses(self) -> bool:
        return self.vs_best_static[WARM].value < CAPACITY_NEAR


class Result(NamedTuple):
    """All that a setting's runs say; of what has not been run it says nothing."""

    setting: Setting
    cells: list[CellResult]
    full: CapacityResult | None
    latency_s: dict[float, dict[str, float]]  #: by load, those beyond capacity too, and policy
    best_static: dict[float, str]  #: by load


def of(setting: Setting, runs: Sequence[Run]) -> Result:
    """The result of a setting's runs."""
    by_load = {load: by_policy(runs, load, "latency_s") for load in {run.load for run in runs}}
    latency = {load: means(by_load[load]) for load in sorted(by_load) if load != FULL}
    best = {load: min(setting.statics, key=of_one.__getitem__) for load, of_one in latency.items()}
    cells = [
        CellResult(
            f"{setting.name}@{load:g}",
            load,
            latency[load],
            best[load],
            _ratios(by_load[load], best[load]),
            _ratios(by_load[load], "none"),
        )
        for load in setting.loads
        if load in by_load
    ]
    return Result(setting, cells, _capacity(setting, runs), latency, best)


def _capacity(setting: Setting, runs: Sequence[Run]) -> CapacityResult | None:
    rates = by_policy(runs, FULL, "served_per_s")
    if not rates:
        return None
    most = max(setting.statics, key=means(rates).__getitem__)
    return CapacityResult(means(rates), most, _ratios(rates, most))


def figures(results: Sequence[Result]) -> dict[str, float]:
    """What is recorded; names with `cold` are of SmartSpec's cold start, the others of the warm."""
    found: dict[str, float] = {}
    cells = [cell for result in results for cell in result.cells]
    ruled = [cell for cell in cells if cell.load <= RULED_UP_TO]
    full = [result.full for result in results if result.full is not None]
    for prefix, policy in (("", WARM), ("cold_", COLD)):
        worst = max((cell.vs_best_static[policy] for cell in ruled), key=lambda ratio: ratio.value)
        found[f"{prefix}worst_cell_vs_best_static"] = worst.value
        found[f"{prefix}worst_cell_vs_best_static_upper95"] = worst.upper95
        found[f"{prefix}worst_cell_vs_none"] = max(cell.vs_none[policy].value for cell in ruled)
        if full:
            least = min(one.vs_best_static[policy].value for one in full)
            found[f"{prefix}worst_capacity_vs_best_static"] = least
        found[f"{prefix}best_cell_speedup"] = max(
            1 / cell.vs_none[policy].value for cell in cells if cell.load <= SPEEDUP_UP_TO
        )
    found["num_cells"] = len(cells)
    found["num_cells_up_to_0.8"] = len(ruled)
    found["num_cells_missed"] = sum(cell.misses for cell in cells)
    found["num_capacities"] = len(full)
    found["num_capacities_missed"] = sum(one.misses for one in full)
    return found


def misses(results: Sequence[Result]) -> dict[str, str]:
    """Cells and capacities that fall short of what is asked, in words."""
    found = {}
    for result in results:
        for cell in result.cells:
            if cell.misses:
                static, none = cell.vs_best_static[WARM], cell.vs_none[WARM]
                found[cell.name] = (
                    f"{static.value:.3f} of {cell.best_static} (bound {static.upper95:.3f}), "
                    f"{none.value:.3f} of none"
                )
        if result.full is not None and result.full.misses:
            ratio = result.full.vs_best_static[WARM].value
            found[f"{result.setting.name}, full queue"] = (
                f"{ratio:.3f} of what {result.full.best_static} serves"
            )
    return found


def by_policy(runs: Iterable[Run], load: float, value: str) -> dict[str, list[float]]:
    """Values at a load, in the order of seeds."""
    found: dict[str, list[float]] = {}
    for run in sorted((run for run in runs if run.load == load), key=lambda run: run.seed):
        found.setdefault(run.policy, []).append(getattr(run, value))
    return found


def means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: sum(of_one) / len(of_one) for name, of_one in values.items()}


def _ratios(values: Mapping[str, Sequence[float]], reference: str) -> dict[str, Ratio]:
    return {name: paired_ratio(of_one, values[reference]) for name, of_one in values.items()}
