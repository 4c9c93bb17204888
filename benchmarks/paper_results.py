"""From runs to what is claimed: ratios paired over seeds, the worst cells, and those that miss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from paired import Ratio, paired_ratio
from paper_grid import Setting
from paper_runs import COLD, FULL, WARM, Run

RULED_UP_TO = 0.8  #: the load up to which every cell is to be near the best
SPEEDUP_UP_TO = 0.9
NEAR = 1.02  #: of the best static length, and of none
CAPACITY_NEAR = 0.99


class CellResult(NamedTuple):
    """A setting at a load. Ratios are of mean latency, so that less than 1 is better."""

    setting: str
    load: float
    latency_s: dict[str, float]  #: mean over seeds, by policy
    best_static: str  #: in hindsight: the lowest mean over seeds
    vs_best_static: dict[str, Ratio]  #: by policy
    vs_none: dict[str, Ratio]

    @property
    def name(self) -> str:
        return f"{self.setting}@{self.load:g}"

    @property
    def misses(self) -> bool:
        """Whether warm SmartSpec is not as near as asked, where that is asked."""
        worst = max(self.vs_best_static[WARM].value, self.vs_none[WARM].value)
        return self.load <= RULED_UP_TO and worst > NEAR


class CapacityResult(NamedTuple):
    """What a setting serves with a full queue; ratios above 1 are better."""

    setting: str
    served_per_s: dict[str, float]
    best_static: str
    vs_best_static: dict[str, Ratio]

    @property
    def misses(self) -> bool:
        return self.vs_best_static[WARM].value < CAPACITY_NEAR


def cells(setting: Setting, runs: Sequence[Run]) -> list[CellResult]:
    """One per load that all policies met."""
    found = []
    for load in setting.loads:
        seconds = _by_policy((run for run in runs if run.load == load), "latency_s")
        mean = _means(seconds)
        best = min(setting.statics, key=mean.__getitem__)
        found.append(
            CellResult(
                setting.name,
                load,
                mean,
                best,
                {name: paired_ratio(values, seconds[best]) for name, values in seconds.items()},
                {name: paired_ratio(values, seconds["none"]) for name, values in seconds.items()},
            )
        )
    return found


def capacity(setting: Setting, runs: Sequence[Run]) -> CapacityResult:
    """With a full queue."""
    rates = _by_policy((run for run in runs if run.load == FULL), "served_per_s")
    mean = _means(rates)
    best = max(setting.statics, key=mean.__getitem__)
    ratios = {name: paired_ratio(values, rates[best]) for name, values in rates.items()}
    return CapacityResult(setting.name, mean, best, ratios)


def best_static_by_load(setting: Setting, runs: Sequence[Run]) -> dict[float, str]:
    """The best static length at every load, those beyond capacity among them."""
    found = {}
    for load in (*setting.loads, *setting.static_loads):
        mean = _means(_by_policy((run for run in runs if run.load == load), "latency_s"))
        found[load] = min(setting.statics, key=mean.__getitem__)
    return found


def figures(
    all_cells: Sequence[CellResult], capacities: Sequence[CapacityResult]
) -> dict[str, float]:
    """What FIGURES are recorded; `worst_*` without `cold` are of the warm start."""
    found: dict[str, float] = {}
    ruled = [cell for cell in all_cells if cell.load <= RULED_UP_TO]
    for prefix, policy in (("", WARM), ("cold_", COLD)):
        by_static = [cell.vs_best_static[policy] for cell in ruled]
        by_none = [cell.vs_none[policy] for cell in ruled]
        full = [one.vs_best_static[policy] for one in capacities]
        worst = max(by_static, key=lambda ratio: ratio.value)
        found[f"{prefix}worst_cell_vs_best_static"] = worst.value
        found[f"{prefix}worst_cell_vs_best_static_upper95"] = worst.upper95
        found[f"{prefix}worst_cell_vs_none"] = max(ratio.value for ratio in by_none)
        found[f"{prefix}worst_capacity_vs_best_static"] = min(ratio.value for ratio in full)
        found[f"{prefix}best_cell_speedup"] = max(
            1 / cell.vs_none[policy].value for cell in all_cells if cell.load <= SPEEDUP_UP_TO
        )
    found["num_cells"] = len(all_cells)
    found["num_cells_ruled"] = len(ruled)
    found["num_cells_missed"] = sum(cell.misses for cell in all_cells)
    found["num_capacities"] = len(capacities)
    found["num_capacities_missed"] = sum(one.misses for one in capacities)
    return found


def _by_policy(runs: Iterable[Run], value: str) -> dict[str, list[float]]:
    """Values in the order of seeds."""
    found: dict[str, list[float]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        found.setdefault(run.policy, []).append(getattr(run, value))
    return found


def _means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: sum(of_one) / len(of_one) for name, of_one in values.items()}
