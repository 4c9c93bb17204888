"""Puts a run together: an engine, who steers it, and the requests that it is to serve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from smartspec.daemon import config
from smartspec.daemon.control_loop import ControlLoop
from smartspec.daemon.event_bus import Bus, NullBus
from smartspec.daemon.state.library import Library
from smartspec.engine_adapter.base import (
    FEATURE_LAST_SHARE,
    FEATURE_MATCH_LENGTH,
    FixedLength,
    LengthSource,
    StepFacts,
)
from smartspec.engine_adapter.link import EngineLink
from smartspec.engine_adapter.messages import Fingerprint, Hello, Limits
from smartspec.engine_adapter.simulator.engine import Engine
from smartspec.engine_adapter.simulator.events.base import Queue
from smartspec.engine_adapter.simulator.events.daemon_turn import DaemonTurn
from smartspec.engine_adapter.simulator.profile import Profile
from smartspec.engine_adapter.simulator.requests import Outcomes, Traffic
from smartspec.engine_adapter.simulator.run import run
from smartspec.engine_adapter.simulator.wire import Wire
from smartspec.lab.simulation import policies
from smartspec.lab.simulation.static_table import Ground, ListedLengths, beta_survival

POLICIES = (
    "none", "static", "table", "tiers", "authors", "bandit", "switch_off", "informed",
    "clairvoyant", "smartspec",
)  # fmt: skip
#: Made for chains: a table is fitted to them, tiers are of one guess a token, the authors' closed
#: form is a chain's, and what will be accepted of a tree does not fall with rank.
OF_CHAINS = ("table", "tiers", "authors", "clairvoyant")
DAEMON_S = 0.001  #: from a report to the policy that follows from it


@dataclass(frozen=True)
class Cell:
    """All that decides a run but its policy."""

    profile: Profile
    draft: str
    traffic: Traffic
    outcomes: Outcomes
    acceptance: float = 0.7  #: what an operator who tunes a table offline has measured: the mean
    concentration: float = 6.0  #: of a Beta over requests
    presence: float = 1.0  #: how often there is anything to draft
    max_length: int = 5  #: of trees (`Outcomes.trees`), most nodes
    max_num_running: int | None = None
    seed: int = 0
    noise: float = 0.02
    cost_factor: Callable[[float], float] = lambda now_s: 1.0
    watch: Callable[[float, StepFacts], None] | None = None  #: called after every step

    def chains(self, max_length: int) -> Cell:
        """The same, with the same luck, of a drafter that drafts chains of its first guesses."""
        outcomes = replace(self.alone().outcomes, trees=None)
        return replace(self, outcomes=outcomes, max_length=max_length)

    def alone(self) -> Cell:
        """The same, with the same luck, of a drafter whose trees have no copies in them."""
        if self.outcomes.copies is None:
            return self
        outcomes = replace(self.outcomes, copies=None, feature_names=(), features=None)
        return replace(self, outcomes=outcomes)

    def engine(self, source: LengthSource, hear: Callable[[], None] = lambda: None) -> Engine:
        """The engine, steered by ``source``."""
        return Engine(
            self.profile,
            self.draft,
            source,
            self.traffic,
            self.outcomes,
            max_length=self.max_length,
            max_num_running=self.max_num_running,
            seed=self.seed,
            noise=self.noise,
            cost_factor=self.cost_factor,
            hear=hear,
            watch=self.watch,
        )


def rival(name: str, cell: Cell) -> LengthSource:
    """A policy by name; "static3" is length 3 for all.

    Raises ValueError for others, for those of `OF_CHAINS` where drafts are trees, and for
    *informed* where probabilities are not known.
    """
    if cell.outcomes.trees is not None and name in OF_CHAINS:
        raise ValueError(f"{name} is a policy for chains, and drafts are trees")
    if name == "informed" and np.isnan(cell.outcomes.probability).any():
        raise ValueError("informed is told true probabilities, and recorded drafts have none")
    if name == "informed" and cell.outcomes.copies is not None:
        raise ValueError("informed knows of a drafter's guesses, and not of copies beside them")
    if name.startswith("static") and name[6:].isdigit():
        length = int(name[6:])
        if length > cell.max_length:
            raise ValueError(f"{name}: the longest length is {cell.max_length} (max_length)")
        return FixedLength(length)
    match name:
        case "none":
            return FixedLength(0)
        case "table":
            limit = cell.max_num_running or cell.profile.max_num_running
            return ListedLengths(_tuned_for(cell).table(limit))
        case "tiers":
            return policies.AdaptiveTiers(cell.max_length)
        case "authors":
            return policies.AuthorsRule(cell.profile, cell.draft, cell.max_length)
        case "bandit":
            return policies.Bandit(cell.max_length)
        case "switch_off":
            return policies.SwitchOff(min(3, cell.max_length))
        case "informed" | "clairvoyant":
            return policies.Told(cell.draft, clairvoyant=name == "clairvoyant")
        case _:
            known = ", ".join(POLICIES).replace("static", "static<K>")
            raise ValueError(f"no policy {name!r}: choose of {known}")


def _tuned_for(cell: Cell) -> Ground:
    """What an operator knows who tunes a table for these requests."""
    lengths = cell.traffic.num_prompt, cell.traffic.num_output / 2
    context = sum(float(column.mean()) for column in lengths if len(column))
    survival = beta_survival(cell.acceptance, cell.concentration, cell.max_length)
    return Ground(cell.profile, cell.draft, survival, cell.presence, context)


def simulate(
    name: str, cell: Cell, *, library: Library | None = None, bus: Bus | None = None
) -> Engine:
    """Serve a cell's requests under the policy ``name``; returns the engine, done.

    ``library``, ``bus``: of the daemon, where there is one (`Fleet`).
    """
    if name == "smartspec":
        return Fleet([cell], library, bus).run()[0]
    return serve(rival(name, cell), cell)


def serve(source: LengthSource, cell: Cell) -> Engine:
    """Serve a cell's requests with the lengths of ``source``; returns the engine, done."""
    engine = cell.engine(source)
    if isinstance(source, policies.Told):
        source.engine = engine
    run(Queue(), [engine])
    return engine


class Fleet:
    """Engines that one daemon steers: its own loop and messages, on a virtual clock.

    Parameters
    ----------
    cells : one per engine
    library : what was learned before; None: a cold start
    bus : where the daemon's events go
    settings : the daemon's; None: as it comes
    """

    def __init__(
        self,
        cells: list[Cell],
        library: Library | None = None,
        bus: Bus | None = None,
        settings: config.Settings | None = None,
    ) -> None:
        self._queue = queue = Queue()
        self._wire = Wire()
        self._turn_due = False
        self.loop = ControlLoop(
            settings or config.Settings(),
            self._wire,
            bus or NullBus(),
            queue.clock,
            queue.clock,
            library,
        )
        self.links: list[EngineLink] = []
        self.engines: list[Engine] = []
        for i, cell in enumerate(cells):
            name = f"engine-{i}"
            hello = _hello(name, cell)
            link = EngineLink("", hello, clock=queue.clock, socket=self._wire.connect(name))
            self.links.append(link)
            self.engines.append(cell.engine(link, self._heard))

    def run(self) -> list[Engine]:
        """Serve all; returns the engines, done."""
        for link in self.links:
            link.idle()  # an engine says Hello long before its first request
        self._turn()
        run(self._queue, self.engines, self._turn)
        return self.engines

    def _heard(self) -> None:
        if not self._turn_due:
            self._turn_due = True
            self._queue.put(self._queue.now_s + DAEMON_S, DaemonTurn(self._turn))

    def _turn(self) -> None:
        self._turn_due = False
        self.loop.cycle(0.0)


def _features(outcomes: Outcomes) -> tuple[str, ...]:
    if outcomes.features is not None:
        return outcomes.feature_names
    return () if outcomes.match_length is None else (FEATURE_MATCH_LENGTH,)


def _hello(name: str, cell: Cell) -> Hello:
    is_lookup = cell.draft == "lookup"
    proposer = "lookup" if is_lookup else "draft_model"
    if cell.outcomes.copies is not None:
        proposer += "+lookup"
    profile = cell.profile
    return Hello(
        engine=name,
        epoch=1,
        fingerprint=Fingerprint(
            target=profile.target,
            proposer=proposer,
            draft=cell.draft,
            engine="simulator",
            accelerator=profile.accelerator,
        ),
        limits=Limits(
            max_length=cell.max_length,
            max_num_running=cell.max_num_running or profile.max_num_running,
            static_length=min(3, cell.max_length),
            features=(FEATURE_LAST_SHARE, *_features(cell.outcomes)),
            graph_sizes=profile.graph_sizes,
            drafts_known_first=is_lookup,
            trees=cell.outcomes.trees is not None,
            confidences=cell.outcomes.copies is not None,
        ),
    )
