"""Trees under a daemon: sizes that pay, on engines with known gains; and the worker, lossless."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from fakes import ipc_endpoint, until
from scripted_engine import Costs, ScriptedEngine, hello
from tiny_models import VOCABULARY, answers, tiny_head, tiny_model

from smartspec.daemon import config
from smartspec.daemon.control_loop import ControlLoop
from smartspec.daemon.event_bus import NullBus
from smartspec.daemon.transport import Server
from smartspec.engine_adapter.lengths import Choice
from smartspec.engine_adapter.link import EngineLink
from smartspec.engine_adapter.reference.feature_draft import FeatureChain, FeatureDraft
from smartspec.engine_adapter.reference.model import without_layers
from smartspec.engine_adapter.reference.model_runner import ModelRunner
from smartspec.engine_adapter.reference.proposer import Proposer
from smartspec.engine_adapter.reference.replies import Ready
from smartspec.engine_adapter.reference.sequence import Request, SamplingParams
from smartspec.engine_adapter.reference.service import link_to
from smartspec.engine_adapter.reference.tree_draft_model import TreeDraftModel
from smartspec.engine_adapter.reference.tree_lookup import TreeLookup
from smartspec.engine_adapter.reference.worker import Worker

pytestmark = pytest.mark.integration

MOST = 16
GOOD = 0.75 * np.arange(1, MOST + 1) ** -0.7
POOR = 0.15 / np.arange(1, MOST + 1)


@contextmanager
def steered(connect: Callable[[str], EngineLink]) -> Iterator[tuple[ControlLoop, EngineLink]]:
    """A daemon, and an engine's link to it."""
    with ipc_endpoint() as endpoint:
        loop = ControlLoop(config.load(None, {}, {}), Server(endpoint), NullBus())
        link = connect(endpoint)

        def turn() -> None:
            link.idle()
            loop.cycle(0.0)

        try:
            until(lambda: link.stats.num_connections > 0, turn)
            yield loop, link
        finally:
            link.close()
            loop.close()


def goodput_of(engine: ScriptedEngine, lengths: list[np.ndarray]) -> float:
    """Expected tokens over expected seconds of steps at these lengths."""
    c, tokens, seconds = engine.costs, 0.0, 0.0
    assert engine.gains is not None
    totals = np.concatenate([np.zeros((len(engine.gains), 1)), engine.gains.cumsum(axis=1)], axis=1)
    for k in lengths:
        drafts, depth = int(k.sum()), int(k.max())
        tokens += len(k) + float(totals[np.arange(len(k)), k].sum())
        num_tokens = len(k) + drafts
        seconds += c.base_s + c.token_s * num_tokens + c.beyond_s * max(0, num_tokens - c.knee)
        seconds += 1e-4
        if not engine.lookup:
            seconds += c.draft_forward_s * engine.forwards(depth) + c.draft_token_s * drafts
    return tokens / seconds


def scripted(lookup: bool = True) -> Callable[[str], EngineLink]:
    return lambda endpoint: EngineLink(endpoint, hello(max_length=MOST, lookup=lookup, trees=True))


def best_uniform(engine: ScriptedEngine) -> float:
    size = len(engine.ids)
    return max(goodput_of(engine, [np.full(size, length)]) for length in range(MOST + 1))


def run(loop: ControlLoop, engine: ScriptedEngine, steps: int) -> list[Choice]:
    for _ in range(steps):
        engine.step()
        loop.cycle(0.01)
    return engine.choices[-steps:]


REGIMES = {
    "lookup_idle": (Costs(base_s=0.03, token_s=0.0005), [GOOD] * 2, True),
    "lookup_busy": (Costs(base_s=0.004, token_s=0.002), [POOR * 2] * 24, True),
    "lookup_past_a_knee": (Costs(0.02, 0.0001, knee=96, beyond_s=0.0006), [GOOD] * 16, True),
    "draft_idle": (Costs(0.03, 0.0005, draft_forward_s=0.003), [GOOD] * 3, False),
    "draft_mixed": (Costs(0.03, 0.0013, draft_forward_s=0.004), [GOOD] * 6 + [POOR] * 6, False),
    "draft_that_costs_more_than_it_brings": (
        Costs(0.03, 0.001, draft_forward_s=0.02),
        [POOR] * 4,
        False,
    ),
}


@pytest.mark.parametrize("regime", REGIMES)
def test_goodput_comes_near_the_best_uniform_tree_in_hindsight(regime: str) -> None:
    costs, gains, lookup = REGIMES[regime]
    with steered(scripted(lookup)) as (loop, link):
        engine = ScriptedEngine(
            link, np.ones(len(gains)), costs, MOST, lookup, gains=np.array(gains)
        )
        run(loop, engine, 250)
        choices = run(loop, engine, 150)
        goodput = goodput_of(engine, [choice.lengths for choice in choices])
        assert goodput >= 0.96 * best_uniform(engine)
        assert link.stats.num_errors == link.stats.num_bad_frames == 0
        assert not any(name.startswith("failures") for name in loop.counters)


def test_requests_have_trees_of_their_own_size_when_they_differ() -> None:
    costs, gains = Costs(0.03, 0.0006), np.array([GOOD] * 8 + [POOR] * 8)
    with steered(scripted()) as (loop, link):
        engine = ScriptedEngine(link, np.ones(16), costs, MOST, gains=gains)
        run(loop, engine, 400)
        choices = run(loop, engine, 100)
        sizes = np.mean([choice.lengths for choice in choices], axis=0)
        assert sizes[:8].min() > sizes[8:].max() + 1
        goodput = goodput_of(engine, [choice.lengths for choice in choices])
        assert goodput > 1.03 * best_uniform(engine)


# -- the worker -----------------------------------------------------------------------------------

ROWS, MODEL_LEN = 6, 96
PROPOSERS: dict[str, Callable[[], Proposer]] = {
    "lookup-tree": lambda: TreeLookup(MOST, 1, 4, history_tokens=600),
    "draft-tree": lambda: TreeDraftModel(
        ModelRunner(without_layers(tiny_model("llama"), [1]), ROWS, MODEL_LEN), MOST
    ),
    "eagle": lambda: FeatureDraft(tiny_head(tiny_model("llama")), ROWS, MODEL_LEN, MOST),
    "eagle-chain": lambda: FeatureChain(tiny_head(tiny_model("llama")), ROWS, MODEL_LEN, MOST),
}


def requests() -> list[Request]:
    rng = np.random.default_rng(4)
    made = []
    for i in range(24):
        prompt = rng.integers(0, VOCABULARY, int(rng.integers(1, 12))).tolist()
        prompt = (prompt * 4)[:24] if i % 2 else prompt
        sampling = SamplingParams(temperature=0.7, seed=i) if i % 3 else SamplingParams()
        made.append(Request(prompt, max_tokens=60, sampling=sampling))
    return made


def worker(proposer: Proposer | None = None, link: EngineLink | None = None) -> Worker:
    return Worker(
        tiny_model("llama"),
        proposer=proposer,
        length_source=link,
        max_num_running=ROWS,
        max_model_len=MODEL_LEN,
    )


def link_of(endpoint: str, proposer: Proposer) -> EngineLink:
    """As a worker process with this proposer connects."""
    facts = Ready(
        model="tiny", draft_model="", proposer=proposer.name, features=worker(proposer).features,
        max_length=MOST, own_length=3, max_num_running=ROWS, max_model_len=MODEL_LEN, device="cpu",
        dtype="float64", engine_version="0",
    )  # fmt: skip
    link = link_to(endpoint, "worker-0")(facts)
    assert isinstance(link, EngineLink)
    assert link.hello.limits.trees == (proposer.name != "eagle-chain")
    assert link.hello.limits.confidences == (proposer.name != "lookup-tree")
    return link


@pytest.mark.parametrize("name", PROPOSERS)
def test_output_is_the_same_when_a_daemon_sizes_the_trees(name: str) -> None:
    plain = worker()
    ids = [plain.add_request(request) for request in requests()]
    expected = answers(plain)
    proposer = PROPOSERS[name]()
    with steered(lambda endpoint: link_of(endpoint, proposer)) as (loop, link):
        engine = worker(proposer, link)
        seen = [engine.add_request(request) for request in requests()]
        drafted: list[int] = []

        def between(step: int) -> None:
            loop.cycle(0.01)
            [session] = loop.sessions.by_name.values()
            if session.engine.last is not None:
                drafted.extend(session.engine.last.num_drafted.tolist())

        found = answers(engine, between)
        assert [found[i].tokens for i in seen] == [expected[i].tokens for i in ids]
        assert loop.counters["frames_refused"] == 0
        assert link.stats.num_errors == link.stats.num_bad_frames == 0
        assert link.stats.state in ("policy", "probe")
        assert len(set(drafted)) > 3  # sizes were many
        [session] = loop.sessions.by_name.values()
        assert session.engine.acceptance.num_observed().sum() > 100
