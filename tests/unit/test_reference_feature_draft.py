"""A head drafts as it was trained to: its cache follows what is known, and its file its target."""

from __future__ import annotations

import heapq
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, tiny_head, tiny_model
from torch import Tensor

from smartspec.engine_adapter.base import FEATURE_DRAFT_CONFIDENCE, FixedLength
from smartspec.engine_adapter.messages import NOT_RUN
from smartspec.engine_adapter.reference import feature_head
from smartspec.engine_adapter.reference.calibration import Calibration
from smartspec.engine_adapter.reference.candidates import Candidates
from smartspec.engine_adapter.reference.draft_tree import ROOT, DraftTree
from smartspec.engine_adapter.reference.feature_draft import FeatureChain, FeatureDraft
from smartspec.engine_adapter.reference.feature_head import FeatureHead, HeadNotUsable
from smartspec.engine_adapter.reference.model_runner import ModelRunner, Segment
from smartspec.engine_adapter.reference.sequence import Request, Sequence
from smartspec.engine_adapter.reference.worker import Worker

MAX_LEN = 64
LAYERS = (1, 2)

Branch = tuple[int, ...]  # of tokens, from the root


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )


def children_by_hand(head: FeatureHead, tokens: list[int], path: Branch) -> list[tuple[float, int]]:
    """What may follow, and its chances: from one pass of the target and whole ones of the head."""
    target = ModelRunner(tiny_model("llama"), 1, MAX_LEN)
    _, features = target.forward_with_features([Segment(0, 0, tokens, 1)], LAYERS)
    before = head.state(features[:-1])
    states = torch.cat((torch.zeros_like(before[:1]), before))
    read = list(tokens)
    for token in (*path, None):
        places = torch.arange(len(read))[None]
        after = head.advance(states[None], torch.tensor([read]), places, causal)[0]
        if token is not None:
            read.append(token)
            states = torch.cat((states, after[-1:]))
    chances, ids = head.logits(after[-1]).softmax(-1).topk(FeatureDraft.num_children)
    return list(zip(chances.tolist(), head.token_ids[ids].tolist(), strict=True))


def paths_by_hand(head: FeatureHead, tokens: list[int], size: int) -> set[Branch]:
    """The most probable of all, best first."""
    heap = [(-chance, (token,)) for chance, token in children_by_hand(head, tokens, ())]
    best: set[Branch] = set()
    while len(best) < size:
        heapq.heapify(heap)
        chance, path = heapq.heappop(heap)
        best.add(path)
        heap += [(chance * own, (*path, t)) for own, t in children_by_hand(head, tokens, path)]
    return best


def paths_of(tree: DraftTree) -> set[Branch]:
    paths: list[Branch] = []
    for token, parent in zip(*tree, strict=True):
        paths.append((*(paths[parent] if parent != ROOT else ()), token))
    return set(paths)


class Watched(FeatureDraft):
    """Keeps what it proposed, with the tokens that it knew."""

    def __init__(self, head: FeatureHead, max_pass_tokens: int = 512) -> None:
        super().__init__(head, 3, MAX_LEN, 4, max_pass_tokens, copies=False)
        self.seen: list[tuple[list[int], DraftTree]] = []

    def propose(self, sequences: list[Sequence], lengths: np.ndarray):  # type: ignore[no-untyped-def]
        proposal = super().propose(sequences, lengths)
        for sequence, tree in zip(sequences, proposal.drafts, strict=True):
            self.seen.append((list(sequence.tokens), tree))
        return proposal


@pytest.mark.parametrize("max_pass_tokens", [512, 5], ids=["one_pass", "many_passes"])
def test_drafts_are_those_of_whole_passes_whatever_was_accepted_before(
    max_pass_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Calibration, "learn", lambda *outcome: None)  # it would change the trees
    head = tiny_head(tiny_model("llama"))
    proposer = Watched(head, max_pass_tokens)
    lengths = FixedLength(4)
    worker = Worker(
        tiny_model("llama"),
        proposer=proposer,
        length_source=lengths,
        max_num_running=3,
        max_model_len=MAX_LEN,
        max_prefill_tokens=7,
    )
    rng = np.random.default_rng(3)
    for size in (1, 19, 6, 30):  # four requests and three rows: rows move
        worker.add_request(Request(rng.integers(0, VOCABULARY, size).tolist(), 16 + size % 5))
    steps = 0
    while worker.has_work:
        worker.step()
        steps += 1
        lengths.length = (4, 0, 2)[steps % 3]  # steps without drafts, after which it catches up
    drafted = [(known, tree) for known, tree in proposer.seen if tree.size]
    assert len(drafted) > 20
    with torch.inference_mode():
        for known, tree in drafted:
            assert paths_of(tree) == paths_by_hand(head, known, tree.size)
    assert any(tree.depths[-1] > 1 for _, tree in drafted)
    assert any(tree.parents.count(ROOT) > 1 for _, tree in drafted)


def test_head_catches_up_with_what_it_did_not_read_while_text_was_copied() -> None:
    head = tiny_head(tiny_model("llama"))
    proposer = FeatureDraft(head, 1, MAX_LEN, 6)
    for _ in range(300):  # copies are always right
        one = Candidates(proposer._calibration, np.zeros(1, np.int64))
        one.copy([[1, 2]], [[0.7, 0.7]])
        one.learn([[1, 2]])
    sequence = Sequence(1, Request([1, 2, 3, 4, 5, 9, 9, 2, 3, 4, 5]), 20, 0, 0.0)
    sequence.row = 0
    target = ModelRunner(tiny_model("llama"), 1, MAX_LEN)
    known = [Segment(0, 0, sequence.tokens[:-1], 0)]
    proposer.read([sequence], [target.forward_with_features(known, LAYERS)[1]])
    proposer.available([sequence])
    proposal = proposer.propose([sequence], np.array([4]))
    assert proposal.drafts[0] == DraftTree.chain([9, 9, 2, 3])
    assert proposal.num_forwards == proposal.num_draft_tokens == 0
    sequence.tokens += [40, 41]
    more = [Segment(0, 10, sequence.tokens[10:-1], 0)]
    proposer.accepted([sequence], [[]])
    proposer.read([sequence], [target.forward_with_features(more, LAYERS)[1]])
    proposer.available([sequence])
    with torch.inference_mode():
        expected = paths_by_hand(head, sequence.tokens, 6)
    assert paths_of(proposer.propose([sequence], np.array([6])).drafts[0]) == expected


def test_a_chain_is_of_the_heads_first_choices_and_of_what_is_copied() -> None:
    """And the head goes on from a copied token as from its own."""
    head = tiny_head(tiny_model("llama"))
    rng = np.random.default_rng(2)
    kinds = set()
    for _ in range(12):
        proposer = FeatureChain(head, 1, MAX_LEN, 5)
        for _ in range(300):  # of copies the first token is right as a rule, no other is
            one = Candidates(proposer._calibration, np.zeros(1, np.int64))
            one.copy([[1, 2]], [[0.7, 0.7]])
            one.learn([[1, 9]])
        tokens = rng.integers(0, VOCABULARY, 9).tolist()
        tokens += tokens[:3]
        sequence = Sequence(1, Request(tokens), 20, 0, 0.0)
        sequence.row = 0
        target = ModelRunner(tiny_model("llama"), 1, MAX_LEN)
        known = [Segment(0, 0, tokens[:-1], 0)]
        proposer.read([sequence], [target.forward_with_features(known, LAYERS)[1]])
        proposer.available([sequence])
        tree = proposer.propose([sequence], np.array([5])).drafts[0]
        assert tree == DraftTree.chain(tree.tokens) and tree.size == 5
        text, told = (tokens[3:] * 2)[:5], ""
        for depth, token in enumerate(tree.tokens):
            before = tuple(tree.tokens[:depth])
            if token == text[depth] and before == tuple(text[:depth]):
                told += "c"
                continue
            with torch.inference_mode():
                assert token == children_by_hand(head, tokens, before)[0][1]
            told += "h"
        kinds.add(told)
    assert {"c", "h"} in map(set, kinds)


@pytest.mark.parametrize(("kind", "is_told"), [(FeatureChain, False), (FeatureDraft, True)])
def test_a_chains_copy_is_not_told_as_a_pass_that_was_run(
    kind: type[FeatureDraft], is_told: bool
) -> None:
    head = tiny_head(tiny_model("llama"))
    proposer = kind(head, 2, MAX_LEN, 4)
    sequences = [
        Sequence(i, Request(tokens), 20, 0, 0.0)
        for i, tokens in enumerate(([1, 2, 3, 1, 2], [1, 2, 3, 4, 5]))
    ]
    offer = proposer.available(sequences)
    confidence = offer.features[proposer.features.index(FEATURE_DRAFT_CONFIDENCE)]
    assert (confidence != NOT_RUN).tolist() == [is_told, False]


def test_states_do_not_pile_up_when_nothing_is_drafted() -> None:
    head = tiny_head(tiny_model("llama"))
    proposer = FeatureDraft(head, 1, MAX_LEN, 4, max_pass_tokens=6)
    worker = Worker(
        tiny_model("llama"), proposer=proposer, length_source=FixedLength(0),
        max_num_running=1, max_model_len=MAX_LEN, max_prefill_tokens=5,
    )  # fmt: skip
    request = worker.add_request(Request(list(range(30)), 30))
    most = 0
    while worker.has_work:
        worker.step()
        most = max(most, sum(map(len, proposer._waiting.get(request, []))))
    assert 6 <= most <= 2 * 6 + 5
    assert not proposer._waiting
    assert not proposer._states


def test_head_is_the_same_when_loaded_again(tmp_path: Path) -> None:
    target = tiny_model("llama")
    head = tiny_head(target)
    file = tmp_path / "head.safetensors"
    head.save(file, {"recipe": "none"})
    again = feature_head.load(file, target)
    assert again.config == head.config
    assert again.token_ids.tolist() == head.token_ids.tolist()
    features = torch.randn(1, 5, 64, dtype=torch.float64)
    places = torch.arange(5)[None]
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.inference_mode():
        one, two = (
            h.logits(h.advance(h.state(features), tokens, places, causal)) for h in (head, again)
        )
    torch.testing.assert_close(one, two, atol=0.02, rtol=0.02)  # halves


def test_head_of_another_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "head.safetensors"
    tiny_head(tiny_model("llama")).save(file)
    for other in (tiny_model("llama", seed=1), tiny_model("gpt2")):
        with pytest.raises(HeadNotUsable, match="made for another model"):
            feature_head.load(file, other)
    feature_head.load(file, tiny_model("llama").to(torch.bfloat16))  # precision is no difference


def test_files_that_are_no_heads_are_refused(tmp_path: Path) -> None:
    target = tiny_model("llama")
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    tiny_head(target).save(good)
    with pytest.raises(HeadNotUsable, match="cannot read"):
        feature_head.load(bad, target)
    bad.write_bytes(good.read_bytes()[:1000])
    with pytest.raises(HeadNotUsable, match="cannot read"):
        feature_head.load(bad, target)
    tensors = load_file(good)
    save_file(tensors, bad)
    with pytest.raises(HeadNotUsable, match="no drafter of format"):
        feature_head.load(bad, target)
    with feature_head.safe_open(good, "pt") as file:
        told = file.metadata()
    del tensors["join.weight"]
    save_file(tensors, bad, told)
    with pytest.raises(HeadNotUsable, match="damaged"):
        feature_head.load(bad, target)
