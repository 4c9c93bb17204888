"""What was measured, per arm and phase: figures, a table, and a sentence for each phase."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from rich.table import Table

from smartspec.lab.demo.player import RequestRecord

SMARTSPEC = "smartspec"
OVERALL = "overall"


@dataclass(frozen=True, slots=True)
class Stats:
    """Figures of a group of requests; the names are those of summary.json."""

    num_requests: int
    latency_mean_s: float
    latency_p50_s: float
    latency_p99_s: float
    ttft_mean_s: float
    tpot_mean_s: float  #: over answers of two tokens or more
    goodput_tokens_per_s: float  #: tokens answered, per second from first arrival to last answer


def stats_of(requests: Sequence[RequestRecord]) -> Stats:
    """Raises ValueError without requests.

    A phase's requests are those that *arrived* in it; its goodput is their tokens over the time
    from the first arrival among them to the last answer.
    """
    if not requests:
        raise ValueError("no requests to sum up")
    latency = np.array([request.latency_s for request in requests])
    tpot = np.array([request.tpot_s for request in requests])
    span_s = max(r.finished_s for r in requests) - min(r.arrived_s for r in requests)
    return Stats(
        num_requests=len(requests),
        latency_mean_s=float(latency.mean()),
        latency_p50_s=float(np.percentile(latency, 50)),
        latency_p99_s=float(np.percentile(latency, 99)),
        ttft_mean_s=float(np.mean([request.ttft_s for request in requests])),
        tpot_mean_s=float(np.nanmean(tpot)) if np.isfinite(tpot).any() else math.nan,
        goodput_tokens_per_s=sum(request.num_tokens for request in requests) / span_s,
    )


def stats_in(requests: Sequence[RequestRecord], group: str) -> Stats:
    """Of a phase's requests, or of all of them for "overall"."""
    return stats_of([r for r in requests if group in (OVERALL, r.phase)])


def by_phase(requests: Sequence[RequestRecord]) -> dict[str, Stats]:
    """Statistics of each phase, in order of arrival."""
    return {p: stats_in(requests, p) for p in dict.fromkeys(r.phase for r in requests)}


def arm_summary(requests: Sequence[RequestRecord]) -> dict[str, object]:
    """An arm's entry in summary.json."""
    return {
        "overall": asdict(stats_of(requests)),
        "phases": {phase: asdict(stats) for phase, stats in by_phase(requests).items()},
    }


@dataclass(frozen=True, slots=True)
class Comparison:
    """SmartSpec against the best of the other arms, by mean latency."""

    group: str  #: a phase, or "overall"
    best_other: str
    ratio: float  #: SmartSpec's mean latency over the best other's; below 1: faster

    def __str__(self) -> str:
        where = "Overall" if self.group == OVERALL else f"In the phase '{self.group}'"
        percent = abs(self.ratio - 1)
        if percent < 0.005:
            return f"{where}, SmartSpec was as fast as the best other, {self.best_other}."
        how, side = ("faster", "lower") if self.ratio < 1 else ("slower", "higher")
        return (
            f"{where}, SmartSpec was {how} than the best other, {self.best_other}: "
            f"mean latency {percent:.0%} {side}."
        )


def compare(arms: Mapping[str, Sequence[RequestRecord]]) -> list[Comparison]:
    """Per phase, then overall. Empty without SmartSpec or without another arm."""
    others = [name for name in arms if name != SMARTSPEC]
    if SMARTSPEC not in arms or not others:
        return []
    groups = [*dict.fromkeys(request.phase for request in arms[SMARTSPEC]), OVERALL]
    found = []
    for group in groups:
        means = {name: stats_in(of, group).latency_mean_s for name, of in arms.items()}
        best = min(others, key=lambda name: means[name])
        found.append(Comparison(group, best, means[SMARTSPEC] / means[best]))
    return found


@dataclass(frozen=True, slots=True)
class Answers:
    """Whether all arms said the same."""

    num_compared: int
    num_identical: int
    different: dict[str, list[str]]  #: by prompt: arms whose answer is not the first arm's


def compare_answers(arms: Mapping[str, Sequence[RequestRecord]]) -> Answers:
    """Greedy answers are the same whatever is speculated, but for ties broken by rounding.

    Compared are text and number of tokens. A pass over several tokens adds up in another order than
    a pass over one, so where two next tokens are equally likely to within rounding, another one may
    be chosen.
    """
    answers = {
        name: {r.id: (r.num_tokens, r.text) for r in requests} for name, requests in arms.items()
    }
    if len(answers) < 2:
        return Answers(0, 0, {})
    first, *others = answers
    common = [prompt for prompt in answers[first] if all(prompt in answers[o] for o in others)]
    different = {
        prompt: arms_that_differ
        for prompt in common
        if (arms_that_differ := [o for o in others if answers[o][prompt] != answers[first][prompt]])
    }
    return Answers(len(common), len(common) - len(different), different)


def table_of(arms: Mapping[str, Sequence[RequestRecord]]) -> Table:
    """Every figure by phase and arm; SmartSpec's latency also as a ratio to the best other."""
    table = Table(
        title="request latency (s, from scheduled arrival to last token) and goodput (tok/s)",
        title_justify="left",
        padding=(0, 0),
        collapse_padding=True,
    )
    for name in ("phase", "arm"):
        table.add_column(name, no_wrap=True)
    for name in ("n", "mean", "p50", "p99 s", "TTFT s", "TPOT ms", "tok/s", "vs best"):
        table.add_column(name, justify="right", no_wrap=True)
    ratios = {comparison.group: comparison.ratio for comparison in compare(arms)}
    groups = [*dict.fromkeys(r.phase for requests in arms.values() for r in requests), OVERALL]
    for group in groups:
        for name, requests in arms.items():
            stats = stats_in(requests, group)
            ratio = f"{ratios[group]:.3f}" if name == SMARTSPEC and group in ratios else ""
            table.add_row(
                group if name == next(iter(arms)) else "",
                name,
                str(stats.num_requests),
                f"{stats.latency_mean_s:.2f}",
                f"{stats.latency_p50_s:.2f}",
                f"{stats.latency_p99_s:.2f}",
                f"{stats.ttft_mean_s:.2f}",
                f"{stats.tpot_mean_s * 1e3:.1f}",
                f"{stats.goodput_tokens_per_s:.0f}",
                ratio,
                style="bold" if name == SMARTSPEC else None,
            )
        table.add_section()
    return table
