"""What an engine is to serve: requests at a load, on a GPU, with drafts of some quality."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
import numpy as np
from msgspec import Meta

from smartspec.engine_adapter.simulator import acceptance, arrivals, copies, profile
from smartspec.engine_adapter.simulator.engine import Served
from smartspec.engine_adapter.simulator.profile import Profile
from smartspec.engine_adapter.simulator.recorded import Recorded
from smartspec.engine_adapter.simulator.requests import F64, Outcomes, Traffic
from smartspec.lab.profiles import answers
from smartspec.lab.profiles.observed import AcceptanceSeen
from smartspec.lab.simulation.world import Cell, simulate

W = TypeVar("W", bound="Workload")
Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]
Chance = Annotated[float, Meta(gt=0, lt=1)]
DRAWN_BY = ("acceptance", "concentration", "presence")  #: recorded drafts stand in their place


class Workload(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A GPU and its traffic. Acceptance is Beta over requests, or drafts are as recorded; lengths
    are exponential, or as in a trace. A load of 1 is what is served without speculation.
    """

    profile: str = "h100_8b"  #: a shipped profile, or a file
    draft: str = "eagle"  #: one of the profile's, or "lookup"
    acceptance: Chance = 0.7  #: mean over requests
    concentration: Positive = 6.0
    presence: Annotated[float, Meta(gt=0, le=1)] = 0.6  #: how often a lookup finds a draft
    max_length: Annotated[int, Meta(ge=1, le=16)] = 5  #: of trees, most nodes
    max_num_running: Count = 64
    duration_s: Positive = 60.0  #: of arrivals, as played
    arrivals: Literal["poisson", "gamma", "diurnal"] = "poisson"
    cv: Positive = 2.0  #: coefficient of variation of gaps, for gamma
    swing: Annotated[float, Meta(ge=0, le=1)] = 0.8  #: around the mean rate, for diurnal
    mean_prompt: Positive = 600.0
    mean_output: Positive = 200.0
    trace: str = ""  #: a file of requests, in place of all of ``arrivals`` and lengths
    trace_format: Literal["auto", "azure", "mooncake", "servegen"] = "auto"
    trace_begin_s: Annotated[float, Meta(ge=0)] = 0.0  #: skipped of the trace
    trees: bool = False  #: drafts are trees, of a drafter's five best guesses for each token
    #: a file of recorded drafts, in place of acceptance, concentration and presence
    drafts: str = ""
    copies: str = ""  #: a file of recorded lookups, which trees have among their branches

    def load_profile(self) -> Profile:
        return profile.load(self.profile)

    def mean_lengths(self) -> tuple[float, float]:
        """Mean tokens of prompts and of answers."""
        if not self.trace:
            return self.mean_prompt, self.mean_output
        recorded = _recorded(self)
        return float(recorded.num_prompt.mean()), float(recorded.num_output.mean())

    def check(self) -> None:
        """Raises ValueError for what is not, or cannot be played, naming what is known."""
        self.load_profile().draft(self.draft)
        if self.trees and self.draft == "lookup":
            raise ValueError("trees are of a drafter's guesses: name a draft other than lookup")
        if self.trees and self.drafts:
            raise ValueError("recorded drafts are chains: leave out trees, or drafts")
        if self.copies and not self.trees:
            raise ValueError("copies are branches of trees: set trees, or name draft lookup")
        if self.drafts:
            self.drafts_seen()
        if self.trace:
            _recorded(self)

    @property
    def source_of_drafts(self) -> str:
        """In words, what decides whether drafts are right."""
        if self.drafts:
            return f"drafts as in {Path(self.drafts).name}"
        return f"mean acceptance {self.acceptance:g}"

    def recorded_drafts(self) -> Recorded:
        """Of the file ``drafts``. Raises ValueError saying why it cannot be used."""
        return _drafts(self.drafts, self.draft == "lookup", self.max_length)

    def drafts_seen(self) -> AcceptanceSeen:
        """What an operator has measured of drafts who tunes offline."""
        if not self.drafts:
            presence = self.presence if self.draft == "lookup" else 1.0
            return AcceptanceSeen(self.acceptance, self.concentration, presence)
        tried = self.recorded_drafts().tried(self.max_length)
        pairs = zip(tried.accepted.tolist(), tried.tried.tolist(), strict=True)
        seen = AcceptanceSeen.of(pairs, tried.num_with_drafts / max(tried.num_steps, 1))
        if seen is None:
            raise ValueError(f"{self.drafts}: too few drafts in each answer to tell acceptance")
        return seen

    def cell(self, load: float, seed: int) -> Cell:
        """Requests at ``load`` and their luck; the same arguments give the same cell.

        Raises ValueError where `traffic` does.
        """
        return self.cell_of(self.traffic(load, seed), seed)

    def cell_of(self, traffic: Traffic, seed: int) -> Cell:
        """Given requests, and their luck."""
        seen = self.drafts_seen()
        return Cell(
            self.load_profile(),
            self.draft,
            traffic,
            self._outcomes(traffic, seed),
            acceptance=seen.acceptance,
            concentration=seen.concentration,
            presence=seen.presence,
            max_length=self.max_length,
            max_num_running=self.max_num_running,
            seed=seed,
        )

    def _outcomes(self, traffic: Traffic, seed: int) -> Outcomes:
        num_output = traffic.num_output
        if self.drafts:
            recorded = self.recorded_drafts()
            which = recorded.nearest(num_output, seed)
            return recorded.outcomes(which, num_output, max_length=self.max_length)
        drawn = acceptance.draw(
            acceptance.BetaOverRequests(self.acceptance, self.concentration),
            num_output,
            max_length=self.max_length,
            seed=seed,
            presence=self.presence if self.draft == "lookup" else None,
            trees=self.trees,
        )
        if self.copies:
            drawn = copies.among(drawn, _drafts(self.copies, True, None), num_output, seed=seed)
        return drawn

    def traffic(self, load: float, seed: int) -> Traffic:
        """Requests of ``duration_s``. A trace is sped up to the load: its seed changes nothing.

        Raises ValueError when there are no requests, or a trace ends before ``duration_s``.
        """
        rate = self.rate(load)
        if self.trace:
            recorded = _recorded(self)
            speed_up = rate / (recorded.size / float(recorded.arrival_s[-1]))
            lasts_s = float(recorded.arrival_s[-1]) / speed_up
            if lasts_s < self.duration_s:
                raise ValueError(
                    f"{self.trace}: lasts {math.floor(10 * lasts_s) / 10:g} s at load {load:g}, "
                    f"{speed_up:.2g} times as fast; duration_s: {self.duration_s:g}"
                )
            end = int(np.searchsorted(recorded.arrival_s, self.duration_s * speed_up))
            traffic = recorded.part(slice(0, end), speed_up=speed_up)
        else:
            rng = np.random.default_rng((seed, 3))
            times = self._times(rate, rng)
            traffic = arrivals.exponential_lengths(times, self.mean_prompt, self.mean_output, rng)
        if not traffic.size:
            raise ValueError(f"no request in {self.duration_s:g} s at {rate:.2g}/s: go on longer")
        return traffic

    def _times(self, rate: float, rng: np.random.Generator) -> F64:
        until_s = self.duration_s
        if self.arrivals == "diurnal":
            return arrivals.diurnal(rate, self.swing, until_s, rng, day_s=until_s)
        return arrivals.gamma(rate, until_s, self.cv if self.arrivals == "gamma" else 1.0, rng)

    def rate(self, load: float) -> float:
        """Requests per second at ``load``."""
        return load * _capacity(self)


def made(kind: type[W], given: Mapping[str, object]) -> W:
    """Options of ``kind``. Raises ValueError naming what is wrong."""
    replaced = [name for name in DRAWN_BY if name in given]
    if given.get("drafts") and replaced:
        raise ValueError(f"drafts: stand in place of {', '.join(replaced)}")
    return msgspec.convert(given, kind)


def read(path: Path, kind: type[W], over: Mapping[str, object] | None = None) -> W:
    """Options of ``kind`` from TOML, under those that go ``over`` it.

    Raises ValueError naming what is wrong.
    """
    try:
        given = msgspec.toml.decode(path.read_bytes())
        msgspec.convert(given, kind)  # what is wrong with the file is the file's
    except (msgspec.DecodeError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error
    return made(kind, {**given, **(over or {})})


def capacity(
    gpu: Profile, max_num_running: int, mean_prompt: float, mean_output: float, seed: int = 0
) -> float:
    """Requests per second that are served without speculation, the batch being full throughout.

    Lengths are exponential.
    """
    count = 6 * max_num_running
    rng = np.random.default_rng((seed, 2))
    traffic = arrivals.exponential_lengths(np.zeros(count), mean_prompt, mean_output, rng)
    return capacity_of(gpu, max_num_running, traffic, seed)


def capacity_of(gpu: Profile, max_num_running: int, traffic: Traffic, seed: int = 0) -> float:
    """Requests per second of ``traffic`` that are served without speculation, all being there."""
    at_once = Traffic(np.zeros(traffic.size), traffic.num_prompt, traffic.num_output)
    never = acceptance.draw(acceptance.Constant(0.0), traffic.num_output, max_length=1, seed=seed)
    cell = Cell(gpu, "lookup", at_once, never, max_length=1, max_num_running=max_num_running)
    return middle_rate(simulate("none", cell).served)


def middle_rate(served: Served) -> float:
    """Requests per second while a batch stays full: neither its filling nor its emptying counts."""
    done = np.sort(served.finished_s)
    first, last = len(done) // 3, 2 * len(done) // 3
    return float((last - first) / (done[last] - done[first]))


@lru_cache(maxsize=64)
def _capacity(workload: Workload) -> float:
    gpu = workload.load_profile()
    limit = workload.max_num_running
    if not workload.trace:
        return capacity(gpu, limit, workload.mean_prompt, workload.mean_output)
    recorded = _recorded(workload)
    rng = np.random.default_rng(2)
    drawn = np.sort(rng.choice(recorded.size, 6 * limit))  # a trace may be shorter than this
    return capacity_of(gpu, limit, recorded.part(drawn))


@lru_cache(maxsize=4)
def _drafts(path: str, is_lookup: bool, max_length: int | None) -> Recorded:
    return answers.load(Path(path), is_lookup=is_lookup, max_length=max_length)


@lru_cache(maxsize=4)
def _read(path: str, trace_format: str) -> Traffic:
    try:
        return arrivals.read(Path(path), trace_format)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error


def _recorded(workload: Workload) -> Traffic:
    whole = _read(workload.trace, workload.trace_format)
    begin = int(np.searchsorted(whole.arrival_s, workload.trace_begin_s))
    if whole.size - begin < 2:
        raise ValueError(f"{workload.trace}: fewer than 2 requests from {workload.trace_begin_s} s")
    recorded = whole.part(slice(begin, None))
    if recorded.arrival_s[-1] == 0:
        raise ValueError(
            f"{workload.trace}: all {recorded.size} requests from {workload.trace_begin_s} s on "
            "come at once, so that they have no rate"
        )
    return recorded
