"""Output never depends on speculation: token for token, for all proposers and model families."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from tiny_models import (
    FAMILIES,
    VOCABULARY,
    RandomLengths,
    RandomProposer,
    RandomTrees,
    answers,
    tiny_head,
    tiny_model,
)

from smartspec.engine_adapter.base import DecodeBatch
from smartspec.engine_adapter.lengths import RAGGED, Choice, CostCurve, DraftCost
from smartspec.engine_adapter.prices import Prices
from smartspec.engine_adapter.reference import model_runner
from smartspec.engine_adapter.reference import worker as worker_module
from smartspec.engine_adapter.reference.draft_model import DraftModel
from smartspec.engine_adapter.reference.draft_tree import ROOT, DraftTree, agreeing_path
from smartspec.engine_adapter.reference.feature_draft import FeatureChain, FeatureDraft
from smartspec.engine_adapter.reference.kv_cache import KvCache
from smartspec.engine_adapter.reference.model import without_layers
from smartspec.engine_adapter.reference.model_runner import ModelRunner
from smartspec.engine_adapter.reference.prompt_lookup import PromptLookup
from smartspec.engine_adapter.reference.proposer import Proposer
from smartspec.engine_adapter.reference.sequence import Request, SamplingParams
from smartspec.engine_adapter.reference.tree_draft_model import TreeDraftModel
from smartspec.engine_adapter.reference.tree_lookup import TreeLookup
from smartspec.engine_adapter.reference.worker import Worker

pytestmark = pytest.mark.integration

MAX_RUNNING = 20
MAX_LEN = 120
MAX_LENGTH = 4
MAX_TREE = 17  #: more than what shares a padded group (model_runner.py)
NUM_REQUESTS = 40
EOS = frozenset({7})

#: By name, from the model family and whether the requests are sampled.
PROPOSERS: dict[str, Callable[[str, bool], Proposer]] = {
    "lookup": lambda family, sampled: PromptLookup(MAX_LENGTH, min_ngram=1, max_ngram=4),
    "other_weights": lambda family, sampled: _draft(tiny_model(family, seed=1)),
    "fewer_layers": lambda family, sampled: _draft(without_layers(tiny_model(family), [1])),
    "itself": lambda family, sampled: _draft(tiny_model(family)),
    "eagle": lambda family, sampled: FeatureDraft(
        tiny_head(tiny_model(family)), MAX_RUNNING, MAX_LEN, MAX_LENGTH, max_pass_tokens=40
    ),
    "eagle_chain": lambda family, sampled: _chain(family, copies=False),
    "eagle_chain_with_copies": lambda family, sampled: _chain(family, copies=True),
    "random": lambda family, sampled: RandomProposer(MAX_LENGTH, seed=3),
    "random_trees": lambda family, sampled: _random_trees(family, sampled),
    "lookup_tree": lambda family, sampled: TreeLookup(MAX_TREE, 1, 4, history_tokens=600),
    "draft_tree": lambda family, sampled: _draft_tree(family, copies=False),
    "draft_tree_with_copies": lambda family, sampled: _draft_tree(family, copies=True),
}


def _draft(model: torch.nn.Module) -> DraftModel:
    # Few tokens per pass: catching up with a prompt takes several passes.
    return DraftModel(ModelRunner(model, MAX_RUNNING, MAX_LEN), MAX_LENGTH, max_pass_tokens=40)


def _chain(family: str, copies: bool) -> FeatureChain:
    head = tiny_head(tiny_model(family))
    return FeatureChain(head, MAX_RUNNING, MAX_LEN, MAX_LENGTH, copies=copies)


def _draft_tree(family: str, copies: bool) -> TreeDraftModel:
    thin = ModelRunner(without_layers(tiny_model(family), [1]), MAX_RUNNING, MAX_LEN)
    return TreeDraftModel(thin, 8, 40, copies)


def _random_trees(family: str, sampled: bool) -> RandomTrees:
    prompts = [tuple(request.prompt) for request in requests(sampled)]
    whole = dict(zip(prompts, alone(family, sampled), strict=True))
    return RandomTrees(MAX_TREE, seed=3, expected=whole)


@cache
def requests(sampled: bool) -> tuple[Request, ...]:
    """Prompts of which half repeat themselves; every kind of sampling parameters."""
    rng = np.random.default_rng(5)
    made = []
    for i in range(NUM_REQUESTS):
        size = int(rng.integers(1, 40))
        prompt = rng.integers(0, VOCABULARY, size).tolist()
        if i % 2:
            prompt = (prompt[:7] * 8)[:size]
        sampling = SamplingParams()
        if sampled:
            sampling = SamplingParams(
                temperature=(0.3, 0.8, 1.5)[i % 3],
                top_k=(0, 0, 5, 20)[i % 4],
                top_p=(1.0, 0.9, 0.6)[i % 5 % 3],
                seed=i,
            )
        room = MAX_LEN - len(prompt)
        tokens = min(room, int(rng.integers(40, 100)))
        made.append(Request(prompt, tokens, sampling=sampling, ignore_eos=i % 4 > 0))
    return tuple(made)


@cache
def alone(family: str, sampled: bool) -> tuple[tuple[int, ...], ...]:
    """Each request by itself, one at a time, without speculation, its prompt in one piece."""
    worker = Worker(
        tiny_model(family),
        max_num_running=1,
        max_model_len=MAX_LEN,
        max_prefill_tokens=MAX_LEN,
        eos_token_ids=EOS,
    )
    ids = [worker.add_request(request) for request in requests(sampled)]
    finished = answers(worker)
    return tuple(tuple(finished[i].tokens) for i in ids)


class RandomPrices(RandomLengths):
    """Leaves lengths to the confidences, as a rule, at prices drawn anew for every step."""

    def choose(self, batch: DecodeBatch) -> Choice:
        choice = super().choose(batch)
        if self._rng.random() < 0.2:
            return choice
        curve = CostCurve(RAGGED, [0.0, 1.0], [0.0, float(self._rng.uniform(0.0, 0.4))])
        forward_s, catch_up_s = (float(self._rng.choice((0.0, 0.1, 1.0))) for _ in range(2))
        draft = DraftCost(0.0, forward_s, per_catch_up_s=0.1 * catch_up_s)  # some wait to be read
        floor = self._rng.integers(0, MAX_LENGTH, batch.size)
        floor[self._rng.random(batch.size) < 0.9] = 0
        prices = Prices(1.0, (curve,), draft, floor=floor)
        return Choice(batch.ceiling.astype(np.int64), prices=prices)


def speculative(
    family: str, proposer: Proposer, sampled: bool, source: RandomLengths | None = None
) -> tuple[list[tuple[int, ...]], set[int], RandomLengths]:
    """All requests, joining at random and some leaving early; by default with random lengths.

    Returns the answers, the places of those that were cancelled, and the length source.
    """
    rng = np.random.default_rng(11)
    source = source or RandomLengths(seed=13)
    worker = Worker(
        tiny_model(family),
        proposer=proposer,
        length_source=source,
        max_num_running=MAX_RUNNING,
        max_model_len=MAX_LEN,
        max_prefill_tokens=47,
        eos_token_ids=EOS,
    )
    todo = list(requests(sampled))
    ids = [worker.add_request(todo.pop(0))]
    cancelled: set[int] = set()

    def between(step: int) -> None:
        while todo and rng.random() < 0.7:
            ids.append(worker.add_request(todo.pop(0)))
        if rng.random() < 0.06:
            place = int(rng.integers(len(ids)))
            if worker.cancel(ids[place]):
                cancelled.add(place)

    finished = answers(worker, between)
    assert not todo
    assert worker.scheduler.kv_usage == 0
    return [tuple(finished[i].tokens) for i in ids], cancelled, source


def assert_same(
    found: list[tuple[int, ...]], cancelled: set[int], expected: tuple[tuple[int, ...], ...]
) -> None:
    for place, (tokens, whole) in enumerate(zip(found, expected, strict=True)):
        if place in cancelled:
            assert tokens == whole[: len(tokens)]
        else:
            assert tokens == whole


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "seeded"])
@pytest.mark.parametrize("name", PROPOSERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_output_is_the_same_when_speculating(family: str, name: str, sampled: bool) -> None:
    proposer = PROPOSERS[name](family, sampled)
    found, cancelled, source = speculative(family, proposer, sampled)
    assert_same(found, cancelled, alone(family, sampled))
    # Enough has happened for the comparison to mean something.
    assert sum(map(len, found)) >= 2_000
    assert cancelled
    drafted = np.concatenate([facts.num_drafted for facts in source.facts])
    accepted = np.concatenate([facts.num_accepted for facts in source.facts])
    assert set(range(proposer.max_length + 1)) <= set(drafted.tolist())
    assert accepted.sum() > 0
    if name == "itself":
        assert (accepted == drafted).all()
    else:
        assert (accepted < drafted).any()
    if isinstance(proposer, RandomTrees):
        assert proposer.num_scattered >= 100


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "seeded"])
@pytest.mark.parametrize(
    "name",
    [
        "other_weights",
        "itself",
        "eagle",
        "eagle_chain",
        "eagle_chain_with_copies",
        "draft_tree",
        "draft_tree_with_copies",
    ],
)
def test_output_is_the_same_when_drafts_are_cut_by_confidence(name: str, sampled: bool) -> None:
    proposer = PROPOSERS[name]("llama", sampled)
    found, cancelled, source = speculative("llama", proposer, sampled, RandomPrices(seed=13))
    assert_same(found, cancelled, alone("llama", sampled))
    cut = np.concatenate([f.num_cut for f in source.facts if f.num_cut is not None])
    drafted = np.concatenate([facts.num_drafted for facts in source.facts])
    accepted = np.concatenate([facts.num_accepted for facts in source.facts])
    assert (cut > 0).sum() >= 10 and (drafted > 0).sum() > 100 and cancelled
    assert set(range(proposer.max_length + 1)) <= set(drafted.tolist())
    for facts in source.facts:
        if facts.num_cut is not None:  # what was drafted is told apart from what was verified
            told = facts.num_drafted.astype(int) + facts.num_cut
            # Copies are not run, nor has anybody run all the children of a node.
            if not proposer.trees and not name.endswith("with_copies"):
                assert facts.num_draft_tokens >= told.sum()
            assert (told <= facts.batch.ceiling).all()
            assert facts.num_cut_accepted is not None
            passed = facts.num_accepted.astype(int) + facts.num_cut_accepted
            if proposer.trees and facts.accepted_ranks is not None:
                ranks = facts.accepted_ranks.tolist()
                assert [rank.bit_count() for rank in ranks] == passed.tolist()
                assert all(rank >> size == 0 for rank, size in zip(ranks, told, strict=True))
            assert (passed <= told).all()
    if name == "itself":  # else its cache would hold something that is not the request's text
        assert (accepted == drafted).all()
    else:
        assert (accepted < drafted).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_equals_generate_when_not_speculating(family: str) -> None:
    model = tiny_model(family)
    pairs = list(zip(requests(False), alone(family, False), strict=True))
    for request, tokens in pairs[::3]:
        with torch.inference_mode():
            expected = model.generate(
                torch.tensor([request.prompt]),
                attention_mask=torch.ones(1, len(request.prompt), dtype=torch.int64),
                max_new_tokens=request.max_tokens,
                do_sample=False,
                eos_token_id=None if request.ignore_eos else list(EOS),
                pad_token_id=0,
            )
        assert tokens == tuple(expected[0, len(request.prompt) :].tolist())


@pytest.mark.parametrize(
    "broken",
    [
        lambda tree, drawn: list(range(tree.size)),
        lambda tree, drawn: list(range(min(len(agreeing_path(tree, drawn)) + 1, tree.size))),
    ],
    ids=["accept_every_draft", "accept_one_too_many"],
)
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "seeded"])
def test_comparison_fails_when_the_acceptance_rule_is_broken(
    monkeypatch: pytest.MonkeyPatch,
    broken: Callable[[DraftTree, list[int]], list[int]],
    sampled: bool,
) -> None:
    expected = alone("llama", sampled)
    monkeypatch.setattr(worker_module, "agreeing_path", broken)
    proposer = PROPOSERS["other_weights"]("llama", sampled)
    found, cancelled, _ = speculative("llama", proposer, sampled)
    with pytest.raises(AssertionError):
        assert_same(found, cancelled, expected)


def _first_child(tree: DraftTree, drawn: list[int]) -> list[int]:
    path: list[int] = []
    while (last := path[-1] if path else ROOT) in tree.parents:
        path.append(tree.parents.index(last))
    return path


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (worker_module, "agreeing_path", _first_child),
        (KvCache, "compact", lambda cache, kept: None),
        (model_runner, "lineage", lambda parents: np.tri(len(parents), dtype=np.bool_)),
        (DraftTree, "depths", property(lambda tree: range(1, tree.size + 1))),
    ],
    ids=["first_child_accepted", "path_not_moved", "siblings_seen", "noise_by_slot"],
)
def test_comparison_fails_when_trees_are_handled_wrongly(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, broken: object
) -> None:
    expected = alone("llama", True)
    proposer = PROPOSERS["random_trees"]("llama", True)
    monkeypatch.setattr(owner, name, broken)
    found, cancelled, _ = speculative("llama", proposer, True)
    with pytest.raises(AssertionError):
        assert_same(found, cancelled, expected)
