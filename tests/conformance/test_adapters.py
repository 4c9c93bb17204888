"""What every adapter must keep to, whatever the daemon does: the rules of engine_adapter/base.py.

To add an engine, add a factory to ADAPTERS: it takes a function that makes the engine's length
source from its Hello, and returns something that steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import msgspec
import numpy as np
import pytest
from fakes import Clock, FakeDaemon, ipc_endpoint, policy, until
from scripted_engine import ScriptedEngine, hello
from tiny_models import tiny_model

from smartspec.daemon import config
from smartspec.daemon.control_loop import ControlLoop
from smartspec.daemon.event_bus import NullBus
from smartspec.daemon.transport import Server
from smartspec.engine_adapter import messages as wire
from smartspec.engine_adapter.base import DecodeBatch, LengthSource, StepFacts
from smartspec.engine_adapter.lengths import Choice
from smartspec.engine_adapter.link import EngineLink
from smartspec.engine_adapter.reference.draft_model import DraftModel
from smartspec.engine_adapter.reference.model_runner import ModelRunner
from smartspec.engine_adapter.reference.prompt_lookup import PromptLookup
from smartspec.engine_adapter.reference.proposer import Proposer
from smartspec.engine_adapter.reference.sequence import Request
from smartspec.engine_adapter.reference.worker import Worker

MakeSource = Callable[[wire.Hello], LengthSource]
STEPS = 60


class Adapter(Protocol):
    """An engine under test, decoding requests of its own choice."""

    source: LengthSource

    def step(self) -> Any:
        """Decode one step; at least one request is running."""


class Scripted(ScriptedEngine):
    """Requests come and go now and then."""

    def step(self) -> StepFacts:
        if self.rng.random() < 0.2:
            self.replace(1, self.rng.uniform(0.2, 0.9, 1))
        return super().step()


def scripted(lookup: bool) -> Callable[[MakeSource], Adapter]:
    def make(make_source: MakeSource) -> Adapter:
        greeting = hello(lookup=lookup)
        return Scripted(
            make_source(greeting), np.array([0.8, 0.5, 0.2]), lookup=lookup, match_rate=0.7
        )

    return make


class Reference:
    """The reference worker on a tiny model, three requests at a time."""

    def __init__(self, make_source: MakeSource, proposer: Proposer) -> None:
        self.worker = Worker(
            tiny_model("llama"), proposer=proposer, max_num_running=3, max_model_len=96, seed=0
        )
        self.rng = np.random.default_rng(0)
        self.fill()
        self.worker.step()  # prompts; from here on somebody always decodes
        greeting = hello(max_length=proposer.max_length, max_num_running=3)
        limits = msgspec.structs.replace(
            greeting.limits,
            features=self.worker.features,
            drafts_known_first=proposer.name == "lookup",
        )
        self.source = make_source(msgspec.structs.replace(greeting, limits=limits))
        self.worker.length_source = self.source

    def fill(self) -> None:
        while self.worker.num_running + self.worker.num_waiting < 3:
            prompt = self.rng.integers(0, 6, 8).tolist()
            self.worker.add_request(Request(prompt, max_tokens=int(self.rng.integers(15, 60))))

    def step(self) -> StepFacts | None:
        facts = self.worker.step().facts
        self.fill()
        return facts


def reference_lookup(make_source: MakeSource) -> Adapter:
    return Reference(make_source, PromptLookup(4))


def reference_draft_model(make_source: MakeSource) -> Adapter:
    runner = ModelRunner(tiny_model("llama", num_layers=1), 3, 96)
    return Reference(make_source, DraftModel(runner, 4))


ADAPTERS: dict[str, Callable[[MakeSource], Adapter]] = {
    "scripted_lookup": scripted(lookup=True),
    "scripted_draft_model": scripted(lookup=False),
    "reference_lookup": reference_lookup,
    "reference_draft_model": reference_draft_model,
}


@pytest.fixture(params=sorted(ADAPTERS))
def make_adapter(request: pytest.FixtureRequest) -> Callable[[MakeSource], Adapter]:
    return ADAPTERS[request.param]


@pytest.fixture
def endpoint() -> Iterator[str]:
    with ipc_endpoint() as made:
        yield made


class Dice:
    """A source that chooses at random and writes down all that it hears."""

    def __init__(self, greeting: wire.Hello) -> None:
        self.hello = greeting
        self.rng = np.random.default_rng(1)
        self.steps: list[tuple[DecodeBatch, Choice, StepFacts]] = []
        self.pending: tuple[DecodeBatch, Choice] | None = None

    def choose(self, batch: DecodeBatch) -> Choice:
        assert self.pending is None, "chosen twice without a report"
        lengths = self.rng.integers(0, batch.ceiling.astype(np.int64) + 1)
        self.pending = batch, Choice.fixed(lengths, "dice")
        return self.pending[1]

    def report(self, facts: StepFacts) -> None:
        assert self.pending is not None, "a report of a step that was not chosen for"
        self.steps.append((*self.pending, facts))
        self.pending = None

    def idle(self) -> None:
        pass

    def close(self) -> None:
        pass


def rolled(make_adapter: Callable[[MakeSource], Adapter]) -> Dice:
    adapter = make_adapter(Dice)
    for _ in range(STEPS):
        adapter.step()
    assert isinstance(adapter.source, Dice)
    return adapter.source


# -- reports --------------------------------------------------------------------------------------


def test_every_step_is_reported_once_with_the_batch_that_was_chosen_for(
    make_adapter: Callable[[MakeSource], Adapter],
) -> None:
    dice = rolled(make_adapter)
    assert len(dice.steps) == STEPS and dice.pending is None
    for batch, _, facts in dice.steps:
        assert facts.batch.request_ids.tolist() == batch.request_ids.tolist()


def test_reports_are_complete_and_agree_with_themselves(
    make_adapter: Callable[[MakeSource], Adapter],
) -> None:
    dice = rolled(make_adapter)
    limits = dice.hello.limits
    for batch, _, facts in dice.steps:
        size = batch.size
        assert len(set(batch.request_ids.tolist())) == size <= limits.max_num_running
        assert batch.features.shape == (len(limits.features), size)
        assert np.isfinite(batch.features).all()
        for column in (batch.ceiling, facts.num_drafted, facts.num_accepted, facts.num_emitted):
            assert len(column) == size
        assert (batch.ceiling <= limits.max_length).all()
        assert (facts.num_accepted <= facts.num_drafted).all()
        assert (facts.num_emitted <= facts.num_accepted + 1).all()
        assert facts.step_s > 0
        assert (facts.target_s or 0) + (facts.draft_s or 0) <= facts.step_s
        assert facts.context_tokens > 0
        if not facts.num_drafted.any() and not limits.drafts_known_first:
            assert facts.num_draft_tokens == facts.num_draft_forwards == 0


def test_lengths_are_obeyed(make_adapter: Callable[[MakeSource], Adapter]) -> None:
    drafted = []
    for batch, choice, facts in rolled(make_adapter).steps:
        assert facts.num_drafted.tolist() == choice.lengths.tolist()
        assert (facts.num_drafted <= batch.ceiling).all()
        drafted += facts.num_drafted.tolist()
    assert len(set(drafted)) > 3  # or it proves nothing


def test_daemon_believes_every_report_and_misses_none(
    make_adapter: Callable[[MakeSource], Adapter], endpoint: str
) -> None:
    loop = ControlLoop(config.load(None, {}, {}), Server(endpoint), NullBus())
    adapter = make_adapter(lambda greeting: EngineLink(endpoint, greeting))
    link = adapter.source
    assert isinstance(link, EngineLink)

    def turn() -> None:
        link.idle()
        loop.cycle(0.0)

    until(lambda: link.stats.num_connections, turn)
    for _ in range(STEPS):
        adapter.step()
        loop.cycle(0.01)
    until(lambda: loop.counters["reports"] == STEPS, lambda: loop.cycle(0.01))
    assert loop.counters["frames_refused"] == loop.counters["steps_missed"] == 0
    assert link.stats.state in ("policy", "probe")
    link.close()
    loop.close()


# -- when the daemon is not as it should be -------------------------------------------------------


class Linked:
    """An adapter on a link with a fake clock, and a bare socket for a daemon."""

    def __init__(self, make_adapter: Callable[[MakeSource], Adapter], endpoint: str) -> None:
        self.clock = Clock()
        self.endpoint = endpoint
        self.adapter = make_adapter(lambda h: EngineLink(endpoint, h, clock=self.clock))
        link = self.adapter.source
        assert isinstance(link, EngineLink)
        self.link = link
        self.daemon: FakeDaemon | None = None

    def start_daemon(self, epoch: int = 99) -> FakeDaemon:
        self.daemon = daemon = FakeDaemon(self.endpoint, epoch)

        def knock() -> None:
            self.clock.now += 0.2
            self.adapter.step()
            daemon.receive()

        until(lambda: daemon.peer, knock)
        return daemon

    def step(self, count: int = 1) -> float:
        """Take steps; returns the wall seconds of the slowest."""
        slowest = 0.0
        for _ in range(count):
            began = time.perf_counter()
            self.adapter.step()
            slowest = max(slowest, time.perf_counter() - began)
        return slowest

    def obey(self, made: wire.Policy) -> None:
        before, daemon = self.link.stats.num_policies, self.daemon
        assert daemon is not None
        daemon.send(made)
        until(lambda: self.link.stats.num_policies > before, self.step)


@pytest.fixture
def linked(make_adapter: Callable[[MakeSource], Adapter], endpoint: str) -> Iterator[Linked]:
    made = Linked(make_adapter, endpoint)
    yield made
    assert made.link.stats.num_errors == 0
    made.link.close()
    if made.daemon is not None:
        made.daemon.close()


STALL_S = (
    3.0  #: a step of these engines takes microseconds; waiting for a daemon would take for ever
)


def test_engine_runs_as_configured_when_there_is_no_daemon(linked: Linked) -> None:
    assert linked.step(STEPS) < STALL_S
    assert linked.link.stats.state == "own"


def test_engine_falls_back_when_the_policy_expires(linked: Linked) -> None:
    linked.start_daemon()
    linked.obey(policy(ttl_s=1.0, fallback_s=10.0))
    linked.step()
    assert linked.link.stats.state == "policy"
    linked.clock.now += 1.5
    linked.step()
    assert linked.link.stats.state == "fallback"
    linked.clock.now += 10.0
    linked.step()
    assert linked.link.stats.state == "own"
    linked.obey(policy(2))
    linked.step()
    assert linked.link.stats.state == "policy"


def test_engine_does_not_wait_when_the_daemon_stops_reading(linked: Linked) -> None:
    linked.start_daemon()
    linked.obey(policy())
    longest = 0.0
    for _ in range(300):  # until all queues and buffers on the way are full
        longest = max(longest, linked.step(20))
        if linked.link.stats.num_reports_dropped > 20:
            break
    assert linked.link.stats.num_reports_dropped > 20
    assert longest < STALL_S


def test_engine_goes_on_when_the_daemon_dies_and_another_comes(linked: Linked) -> None:
    linked.start_daemon().close()
    assert linked.step(STEPS) < STALL_S
    linked.start_daemon(epoch=100)
    linked.obey(policy(1, daemon_epoch=100))
    linked.step()
    assert linked.link.stats.state == "policy"


def test_engine_goes_on_when_the_daemon_lies(linked: Linked) -> None:
    daemon = linked.start_daemon()
    nan = float("nan")
    lies: list[wire.Message | bytes] = [
        policy(2, value_of_time=nan),
        policy(3, curves=()),
        policy(4, log_survival=b"\0"),
        policy(5, depth=2**60, probe_length=2**60, num_probes=2**60),
        policy(6, fallback_length=(2**60, 2**60)),
        policy(7, axes=(wire.BucketAxis(feature="no such", edges=(nan,)),)),
        policy(8, epoch=12345),
        wire.Resync(daemon_epoch=99),
        wire.Heartbeat(daemon_epoch=98),
        wire.Heartbeat(daemon_epoch=99),
        b"",
        b"\xc1" * 1000,
        bytes(wire.MAX_FRAME_BYTES + 1),
    ]
    for turn in range(30):
        daemon.send(*lies[: 1 + turn % len(lies)], *lies)
        assert linked.step(3) < STALL_S
        daemon.receive()
    until(lambda: linked.link.stats.num_bad_frames > 100, linked.step)
    linked.obey(policy(1000, daemon_epoch=77))
    linked.step()
    assert linked.link.stats.state == "policy"
