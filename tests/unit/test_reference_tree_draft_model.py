"""Drafted trees hold the most probable nodes; the draft model's cache follows what is kept."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, tiny_model

from smartspec.engine_adapter.lengths import RAGGED, CostCurve, DraftCost
from smartspec.engine_adapter.prices import Prices
from smartspec.engine_adapter.reference.calibration import Calibration
from smartspec.engine_adapter.reference.candidates import Candidates
from smartspec.engine_adapter.reference.draft_tree import ROOT, DraftTree
from smartspec.engine_adapter.reference.model_runner import ModelRunner
from smartspec.engine_adapter.reference.sampling import Draws, likeliest
from smartspec.engine_adapter.reference.sequence import Request, SamplingParams, Sequence
from smartspec.engine_adapter.reference.tree_draft_model import TreeDraftModel

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
        found = likeliest(logits, draws, TreeDraftModel.num_children)
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
    proposer = TreeDraftModel(runner, max_length=9, copies=False)
    running = sequences(KINDS[kind])
    num_scattered = 0
    for _ in range(6):
        lengths = rng.integers(0, 10, NUM_ROWS)
        plain = ModelRunner(tiny_model("gpt2", seed=1), NUM_ROWS, MAX_LEN)
        fresh = TreeDraftModel(plain, 9, copies=False)
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


def with_copy() -> Sequence:
    """Of which the end has occurred before, and all that would be copied is known to be right."""
    sequence = sequences(KINDS["greedy"])[0]
    sequence.tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]
    return sequence


def sure_of_copies(proposer: TreeDraftModel) -> None:
    for _ in range(300):
        one = Candidates(proposer._calibration, np.zeros(1, np.int64))
        one.copy([[1, 2]], [[0.625, 0.625]])
        one.learn([[1, 2]])


def test_copies_are_branches_beside_the_drafts() -> None:
    proposer = TreeDraftModel(ModelRunner(tiny_model("llama", seed=1), NUM_ROWS, MAX_LEN))
    sequence = with_copy()
    offer = proposer.available([sequence])
    proposal = proposer.propose([sequence], np.array([12]))
    paths = paths_of(proposal.drafts[0])
    assert (4,) in paths and (4, 5) in paths
    assert any(path[0] != 4 for path in paths)
    assert proposal.num_forwards > 0
    assert offer.features[1, 0] > 0  # how sure the copy is of its first token


def test_draft_model_is_not_run_where_a_copy_is_as_good_as_certain() -> None:
    proposer = TreeDraftModel(ModelRunner(tiny_model("llama", seed=1), NUM_ROWS, MAX_LEN))
    sure_of_copies(proposer)
    sequence = with_copy()
    proposer.available([sequence])
    proposal = proposer.propose([sequence], np.array([3]))
    assert proposal.drafts[0] == DraftTree.chain([4, 5, 6])
    assert proposal.num_forwards == proposal.num_draft_tokens == 0


@pytest.mark.parametrize(
    ("forward_s", "token_price", "kinds"),
    [
        (100.0, 100.0, {"none"}),
        (100.0, 0.3, {"none", "copy"}),
        (0.0, 0.05, {"tree"}),
    ],
    ids=["all_too_dear", "forwards_too_dear", "cheap"],
)
def test_none_a_copy_and_a_tree_fall_out_of_the_prices(
    forward_s: float, token_price: float, kinds: set[str]
) -> None:
    proposer = TreeDraftModel(ModelRunner(tiny_model("llama", seed=1), NUM_ROWS, MAX_LEN))
    sure_of_copies(proposer)
    running = [with_copy(), *sequences(KINDS["greedy"])[1:]]
    curve = CostCurve(RAGGED, [0.0, 1.0], [0.0, token_price])
    prices = Prices(1.0, (curve,), DraftCost(0.0, forward_s))
    proposer.available(running)
    proposal = proposer.propose_at(running, np.full(NUM_ROWS, 9), prices)
    found = set()
    for place, tree in enumerate(proposal.drafts):
        if not tree.size:
            found.add("none")
        elif tree == DraftTree.chain(tree.tokens) and place == 0 and not proposal.num_forwards:
            found.add("copy")
        else:
            assert tree.parents.count(ROOT) > 1 or tree.depths[-1] > 1
            found.add("tree")
    assert found == kinds
    assert (proposal.num_forwards > 0) == ("tree" in kinds)


def test_verified_nodes_are_those_worth_most_over_the_whole_batch() -> None:
    proposer = TreeDraftModel(ModelRunner(tiny_model("llama", seed=1), NUM_ROWS, MAX_LEN))
    running = sequences(KINDS["greedy"])
    prices = Prices(1.0, (CostCurve(RAGGED, [0.0, 1.0], [0.0, 0.08]),), DraftCost(0.0, 0.01))
    proposer.available(running)
    cut = proposer.propose_at(running, np.full(NUM_ROWS, 9), prices).cut
    assert cut is not None and cut.num_verified.any() and cut.num_cut.any()
    for chances, size in zip(cut.chances, cut.num_verified.tolist(), strict=True):
        assert all(chance > 0.08 for chance in chances[:size])
        assert all(chance <= 0.08 for chance in chances[size:])


def test_prompt_is_caught_up_with_once_drafts_would_have_paid_for_it() -> None:
    """The short one at once, the long one after some steps; and then both go on."""
    curve = CostCurve(RAGGED, [0.0, 1.0], [0.0, 0.02])
    prices = Prices(1.0, (curve,), DraftCost(per_catch_up_s=0.05))
    proposer = TreeDraftModel(ModelRunner(tiny_model("llama", seed=1), 2, MAX_LEN), copies=False)
    prompt = np.random.default_rng(3).integers(0, VOCABULARY, 40).tolist()
    short, long = Sequence(1, Request([5, 6]), 9, 0, 0.0), Sequence(2, Request(prompt), 9, 0, 0.0)
    short.row, long.row = 0, 1
    drafted = []
    for _ in range(12):
        proposer.available([short, long])
        proposal = proposer.propose_at([short, long], np.full(2, 4), prices)
        drafted.append([tree.size > 0 for tree in proposal.drafts])
        for sequence in (short, long):
            sequence.tokens.append(7)
        proposer.accepted([short, long], [[], []])
    begins = [row[1] for row in drafted].index(True)
    assert all(row[0] for row in drafted)
    assert 0 < begins < 11 and all(row[1] for row in drafted[begins:])
    proposer.forget(long)
    proposer.available([long])
    assert not proposer.propose_at([long], np.full(1, 4), prices).drafts[0].size, "it starts anew"
