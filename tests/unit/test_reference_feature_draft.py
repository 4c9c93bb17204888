"""A head drafts as it was trained to: its cache follows what is known, and its file its target."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, tiny_head, tiny_model
from torch import Tensor

from smartspec.engine_adapter.base import FixedLength
from smartspec.engine_adapter.reference import feature_head
from smartspec.engine_adapter.reference.feature_draft import FeatureDraft
from smartspec.engine_adapter.reference.feature_head import FeatureHead, HeadNotUsable
from smartspec.engine_adapter.reference.model_runner import ModelRunner, Segment
from smartspec.engine_adapter.reference.sequence import Request, Sequence
from smartspec.engine_adapter.reference.worker import Worker

MAX_LEN = 64
LAYERS = (1, 2)


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )


def drafts_by_hand(head: FeatureHead, tokens: list[int], count: int) -> list[int]:
    """Greedy drafts after ``tokens``, from one pass of the target and whole passes of the head."""
    target = ModelRunner(tiny_model("llama"), 1, MAX_LEN)
    _, features = target.forward_with_features([Segment(0, 0, tokens, 1)], LAYERS)
    before = head.state(features[:-1])
    states = torch.cat((torch.zeros_like(before[:1]), before))
    read, drafts = list(tokens), []
    for _ in range(count):
        places = torch.arange(len(read))[None]
        after = head.advance(states[None], torch.tensor([read]), places, causal)[0]
        drafts.append(int(head.token_ids[head.logits(after[-1]).argmax()]))
        read.append(drafts[-1])
        states = torch.cat((states, after[-1:]))
    return drafts


class Watched(FeatureDraft):
    """Keeps what it proposed, with the tokens that it knew."""

    def __init__(self, head: FeatureHead, max_pass_tokens: int = 512) -> None:
        super().__init__(head, 3, MAX_LEN, 4, max_pass_tokens, copies=False)
        self.seen: list[tuple[list[int], list[int]]] = []

    def propose(self, sequences: list[Sequence], lengths: np.ndarray):  # type: ignore[no-untyped-def]
        proposal = super().propose(sequences, lengths)
        for sequence, tree in zip(sequences, proposal.drafts, strict=True):
            self.seen.append((list(sequence.tokens), list(tree.tokens)))
        return proposal


@pytest.mark.parametrize("max_pass_tokens", [512, 5], ids=["one_pass", "many_passes"])
def test_drafts_are_those_of_whole_passes_whatever_was_accepted_before(
    max_pass_tokens: int,
) -> None:
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
    drafted = [(known, drafts) for known, drafts in proposer.seen if drafts]
    assert len(drafted) > 20
    with torch.inference_mode():
        for known, drafts in drafted:
            assert drafts == drafts_by_hand(head, known, len(drafts))


def test_text_that_repeats_itself_is_copied_without_a_pass() -> None:
    head = tiny_head(tiny_model("llama"))
    proposer = FeatureDraft(head, 2, MAX_LEN, 6)
    once = Sequence(1, Request([1, 2, 3, 4, 5, 6, 7, 8, 9]), 20, 0, 0.0)
    again = Sequence(2, Request([1, 2, 3, 4, 5, 9, 9, 2, 3, 4, 5]), 20, 0, 0.0)
    target = ModelRunner(tiny_model("llama"), 2, MAX_LEN)
    for row, sequence in enumerate((once, again)):
        sequence.row = row
        known = [Segment(row, 0, sequence.tokens[:-1], 0)]
        proposer.read([sequence], [target.forward_with_features(known, LAYERS)[1]])
    offer = proposer.available([once, again])
    proposal = proposer.propose([once, again], np.array([6, 6]))
    assert proposal.drafts[1].tokens == [9, 9, 2, 3, 4, 5]
    assert proposal.num_draft_tokens == 6  # the other's alone
    assert offer.features[-1, 1] == pytest.approx(0.7)  # one occurrence, of four tokens
    # What it did not read meanwhile it catches up with.
    again.tokens += [40, 41]
    more = [Segment(1, 10, again.tokens[10:-1], 0)]
    proposer.accepted([again], [[]])
    proposer.read([again], [target.forward_with_features(more, LAYERS)[1]])
    proposer.available([again])
    with torch.inference_mode():
        drafts = drafts_by_hand(head, again.tokens, 6)
    assert proposer.propose([again], np.array([6])).drafts[0].tokens == drafts


def test_head_is_not_run_for_a_request_that_has_begun_to_repeat_itself() -> None:
    head = tiny_head(tiny_model("llama"))
    proposer = FeatureDraft(head, 1, MAX_LEN, 4)
    sequence = Sequence(1, Request([1, 2, 3, 4, 5, 6, 7]), 20, 0, 0.0)
    sequence.row = 0
    target = ModelRunner(tiny_model("llama"), 1, MAX_LEN)
    known = [Segment(0, 0, sequence.tokens[:-1], 0)]
    proposer.read([sequence], [target.forward_with_features(known, LAYERS)[1]])
    proposer.available([sequence])
    assert proposer.propose([sequence], np.array([2])).num_forwards == 2
    proposer.accepted([sequence], [[]])
    sequence.tokens += [2, 3]  # as if two steps had brought them
    more = [Segment(0, 6, sequence.tokens[6:-1], 0)]
    proposer.read([sequence], [target.forward_with_features(more, LAYERS)[1]])
    proposer.available([sequence])
    proposal = proposer.propose([sequence], np.array([2]))
    assert proposal.drafts[0].tokens == [4, 5] and proposal.num_forwards == 0


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
    assert not proposer._state


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
