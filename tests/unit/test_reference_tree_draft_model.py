"""Drafted trees hold the most probable nodes; the draft model's cache follows what is kept."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, tiny_model

from smartspec.engine_adapter.reference.calibration import Calibration
from smartspec.engine_adapter.reference.draft_tree import ROOT, DraftTree
from smartspec.engine_adapter.reference.model_runner import ModelRunner
from smartspec.engine_adapter.reference.sampling import Draws, likeliest
from smartspec.engine_adapter.reference.sequence import Request, SamplingParams, Sequence
from smartspec.engine_adapter.reference.tree_draft_model import NUM_CHILDREN, TreeDraftModel

MAX_LEN = 64
NUM_ROWS = 3
KINDS = {
    "greedy": SamplingParams(),
    "sampled": SamplingParams(temperature=0.8),
    "narrowed": SamplingParams(temperature=2.0, top_k=20, top_p=0.97),
}

Path = tuple[int, ...]


def sequences(params: SamplingParams) -> list[Sequence]:
    rng = np.random.default_rng(7)
    made = []
    for row in range(NUM_ROWS):
        prompt = rng.integers(0, VOCABULARY, 6 + 5 * row).tolist()
        sequence = Sequence(row + 1, Request(prompt, sampling=params), 40, 11 + row, 0.0)
        sequence.row = row
        made.append(sequence)
    return made


def most_probable_paths(model: torch.nn.Module, sequence: Sequence, size: int) -> set[Path]:
    """Best-first search, a pass of the plain model per node."""

    def children(path: Path) -> list[tuple[float, Path]]:
        tokens = torch.tensor([[*sequence.tokens, *path]])
        with torch.inference_mode():
            logits = model(input_ids=tokens, use_cache=False).logits[0, -1:]
        place = [sequence.num_tokens + len(path)]
        draws = Draws.of([(sequence.request.sampling, sequence.seed, place)])
        found = likeliest(logits, draws, NUM_CHILDREN)
        return [(c, (*path, t)) for t, c in zip(*(x[0].tolist() for x in found), strict=True)]

    heap = [(-chance, path) for chance, path in children(())]
    best: set[Path] = set()
    while len(best) < size:
        heapq.heapify(heap)
        chance, path = heapq.heappop(heap)
        best.add(path)
        heap += [(chance * own, longer) for own, longer in children(path)]
    return best


def paths_of(tree: DraftTree) -> list[Path]:
    paths: list[Path] = []
    for token, parent in zip(*tree, strict=True):
        paths.append((*(paths[parent] if parent != ROOT else ()), token))
    return paths


@pytest.mark.parametrize("kind", KINDS)
def test_tree_is_the_most_probable_nodes_of_all(kind: str) -> None:
    plain = tiny_model("llama", seed=1)
    running = sequences(KINDS[kind])
    proposer = TreeDraftModel(ModelRunner(tiny_model("llama", seed=1), NUM_ROWS, MAX_LEN))
    proposer.available(running)
    sizes = [1, 7, 12]
    proposal = proposer.propose(running, np.array(sizes))
    for sequence, tree, size in zip(running, proposal.drafts, sizes, strict=True):
        found = paths_of(tree)
        assert len(found) == size
        assert set(found) == most_probable_paths(plain, sequence, size)
    assert any(tree.depths[-1] > 1 for tree in proposal.drafts)
    assert any(tree.parents.count(ROOT) > 1 for tree in proposal.drafts)


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_are_those_of_a_fresh_cache_when_paths_were_accepted(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is learned would change the trees too.
    monkeypatch.setattr(Calibration, "learn", lambda *outcome: None)
    rng = np.random.default_rng(3)
    runner = ModelRunner(tiny_model("gpt2", seed=1), NUM_ROWS, MAX_LEN)
    proposer = TreeDraftModel(runner, max_length=9)
    running = sequences(KINDS[kind])
    num_scattered = 0
    for _ in range(6):
        lengths = rng.integers(0, 10, NUM_ROWS)
        fresh = TreeDraftModel(ModelRunner(tiny_model("gpt2", seed=1), NUM_ROWS, MAX_LEN), 9)
        for drafter in (proposer, fresh):
            drafter.available(running)
        trees = proposer.propose(running, lengths).drafts
        assert trees == fresh.propose(running, lengths).drafts
        paths = []
        for sequence, tree in zip(running, trees, strict=True):
            node = int(rng.integers(ROOT, tree.size))  # any node's path is the accepted one
            path: list[int] = []
            while node != ROOT:
                path.insert(0, node)
                node = tree.parents[node]
            paths.append(path)
            num_scattered += path != list(range(len(path)))
            sequence.tokens += [*(tree.tokens[node] for node in path), 5]
        proposer.accepted(running, paths)
    assert num_scattered > 0


def test_growth_stays_within_the_row_when_it_is_almost_full() -> None:
    sequence = sequences(KINDS["greedy"])[0]
    sequence.tokens += [3] * (MAX_LEN - sequence.num_tokens - 2)
    proposer = TreeDraftModel(ModelRunner(tiny_model("llama", seed=1), NUM_ROWS, MAX_LEN))
    proposer.available([sequence])
    tree = proposer.propose([sequence], np.array([9])).drafts[0]
    assert tree.size == 9
