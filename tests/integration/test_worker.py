"""The decode loop: joining, leaving, limits, ceilings, reports."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_models import (
    VOCABULARY,
    LetterTokenizer,
    RandomLengths,
    RandomProposer,
    answers,
    tiny_model,
)

from smartspec.engine_adapter.base import FixedLength
from smartspec.engine_adapter.reference import worker as worker_module
from smartspec.engine_adapter.reference.draft_model import DraftModel
from smartspec.engine_adapter.reference.events import Finished, Refused, Tokens
from smartspec.engine_adapter.reference.model_runner import ModelRunner
from smartspec.engine_adapter.reference.prompt_lookup import PromptLookup
from smartspec.engine_adapter.reference.sequence import Request, SamplingParams
from smartspec.engine_adapter.reference.worker import Worker

pytestmark = pytest.mark.integration

REPEATING = [5, 6, 7, 8] * 6


def build(**settings: object) -> Worker:
    settings = {"max_num_running": 4, "max_model_len": 64, "max_prefill_tokens": 16} | settings
    return Worker(tiny_model("llama"), **settings)  # type: ignore[arg-type]


def self_draft(max_length: int = 4, num_rows: int = 4) -> DraftModel:
    return DraftModel(ModelRunner(tiny_model("llama"), num_rows, 64), max_length)


# -- how answers end ------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 4])
def test_answer_ends_at_max_tokens_when_drafts_would_go_further(length: int) -> None:
    source = RandomLengths(0, overshoot=9) if length else FixedLength(0)
    worker = build(proposer=self_draft(), length_source=source)
    ids = [worker.add_request(Request([1, 2, 3], max_tokens=n)) for n in range(1, 12)]
    finished = answers(worker)
    assert [len(finished[i].tokens) for i in ids] == list(range(1, 12))
    assert {finished[i].reason for i in ids} == {"length"}


def test_answer_fills_the_row_when_max_tokens_is_left_out() -> None:
    worker = build(proposer=self_draft())
    number = worker.add_request(Request(list(range(20))))
    assert len(answers(worker)[number].tokens) == 64 - 20


def test_answer_ends_at_eos_when_it_is_among_accepted_drafts() -> None:
    request = Request([3, 1, 4], max_tokens=40)
    plain = build()
    number = plain.add_request(request)
    tokens = answers(plain)[number].tokens
    eos = tokens[9]
    expected = tokens[: tokens.index(eos) + 1]
    for proposer in (None, self_draft()):
        worker = build(proposer=proposer, eos_token_ids=frozenset({eos}))
        first = worker.add_request(request)
        second = worker.add_request(Request([3, 1, 4], max_tokens=40, ignore_eos=True))
        finished = answers(worker)
        assert (finished[first].tokens, finished[first].reason) == (expected, "eos")
        assert (finished[second].tokens, finished[second].reason) == (tokens, "length")


def test_answer_ends_at_the_stop_string_when_it_spans_accepted_drafts() -> None:
    plain = build(tokenizer=LetterTokenizer())
    requests = [Request([i, 2, 9], max_tokens=40) for i in range(12)]
    ids = [plain.add_request(request) for request in requests]
    finished = answers(plain)
    for number, request in zip(ids, requests, strict=True):
        text = finished[number].text
        stop = text[10:13]  # starts and ends inside of longer tokens, for some
        stopping = Request(request.prompt, max_tokens=40, stop=(stop,))
        found = []
        for proposer in (None, self_draft()):
            worker = build(tokenizer=LetterTokenizer(), proposer=proposer)
            again = worker.add_request(stopping)
            streamed = []
            while worker.has_work:
                for event in worker.step().events:
                    if isinstance(event, Tokens):
                        streamed.append(event.text)
                    elif isinstance(event, Finished):
                        assert event.id == again
                        found.append(event)
            assert found[-1].reason == "stop"
            assert found[-1].text == "".join(streamed) == text[: text.index(stop)]
        assert found[0].tokens == found[1].tokens


def test_text_is_streamed_whole_when_answers_end_at_max_tokens() -> None:
    worker = build(tokenizer=LetterTokenizer(), proposer=self_draft())
    ids = [worker.add_request(Request([i, 2, 9], max_tokens=30)) for i in range(10)]
    streamed = dict.fromkeys(ids, "")
    counted = dict.fromkeys(ids, 0)
    while worker.has_work:
        for event in worker.step().events:
            if isinstance(event, Tokens):
                streamed[event.id] += event.text
                counted[event.id] += len(event.tokens)
                assert event.num_tokens == counted[event.id]
            elif isinstance(event, Finished):
                whole = LetterTokenizer().decode(event.tokens)
                assert streamed[event.id].rstrip("\ufffd") == event.text.rstrip("\ufffd")
                assert event.text.replace("\ufffd", "") == whole.replace("\ufffd", "")


# -- room -----------------------------------------------------------------------------------------


def test_request_is_refused_when_it_can_never_fit() -> None:
    worker = build()
    too_long = worker.add_request(Request([1] * 64))
    too_much = worker.add_request(Request([1] * 60, max_tokens=5))
    fits = worker.add_request(Request([1] * 60, max_tokens=4))
    stops = worker.add_request(Request([1], stop=("x",)))
    refused = {}
    finished = {}
    while worker.has_work:
        for event in worker.step().events:
            if isinstance(event, Refused):
                refused[event.id] = event.message
            elif isinstance(event, Finished):
                finished[event.id] = event
    assert set(refused) == {too_long, too_much, stops}
    assert "prompt of 60 tokens and max_tokens=5 exceed max_model_len=64" in refused[too_much]
    assert "tokenizer" in refused[stops]
    assert len(finished[fits].tokens) == 4


def test_requests_are_served_in_order_when_rows_are_short() -> None:
    worker = build(max_num_running=2, proposer=self_draft(num_rows=2))
    ids = [worker.add_request(Request([1, 2, i], max_tokens=6)) for i in range(7)]
    most, firsts = 0, []
    while worker.has_work:
        for event in worker.step().events:
            if isinstance(event, Tokens) and event.num_tokens == len(event.tokens):
                firsts.append(event.id)
        most = max(most, worker.num_running)
    assert most == 2
    assert firsts == ids


def test_row_is_free_again_when_a_request_is_cancelled() -> None:
    worker = build(max_num_running=2, proposer=PromptLookup(4))
    running = [worker.add_request(Request([1, 2, i], max_tokens=50)) for i in range(2)]
    waiting = [worker.add_request(Request([1, 2, i], max_tokens=50)) for i in (5, 6)]
    worker.step()
    worker.step()
    assert (worker.num_running, worker.num_waiting) == (2, 2)
    assert worker.cancel(running[0])
    assert worker.cancel(waiting[0])
    assert not worker.cancel(running[0])
    assert not worker.cancel(12345)
    output = worker.step()
    cancelled = [e for e in output.events if isinstance(e, Finished)]
    assert {e.id: e.reason for e in cancelled} == {running[0]: "cancelled", waiting[0]: "cancelled"}
    assert len(cancelled[0].tokens) == 2
    assert len(cancelled[1].tokens) == 0
    assert [s.id for s in worker.scheduler.running] == [running[1], waiting[1]]
    finished = answers(worker)
    assert set(finished) == {running[1], waiting[1]}
    assert worker.scheduler.kv_usage == 0


# -- lengths --------------------------------------------------------------------------------------


def test_ceilings_are_respected_when_the_source_asks_for_more() -> None:
    source = RandomLengths(3, overshoot=20)
    worker = build(proposer=self_draft(max_length=4), length_source=source)
    limits = {}
    for i, limit in enumerate((None, 0, 2, 9) * 3):
        number = worker.add_request(
            Request([1, 2, i], max_tokens=5 + i, max_speculation_length=limit)
        )
        limits[number] = 4 if limit is None else min(limit, 4)
    left = {number: 5 + i for i, number in enumerate(limits)}
    while worker.has_work:
        output = worker.step()
        facts = output.facts
        if facts is not None:
            for i, number in enumerate(facts.batch.request_ids.tolist()):
                ceiling = min(limits[number], left[number] - 1)
                assert facts.batch.ceiling[i] == ceiling
                assert facts.num_drafted[i] <= ceiling
                assert output.lengths is not None
                assert output.lengths[i] <= ceiling
        for event in output.events:
            if isinstance(event, Tokens):
                left[event.id] -= len(event.tokens)
    assert max(facts.num_drafted.max(initial=0) for facts in source.facts) == 4


def test_batch_tells_what_is_known_before_drafting() -> None:
    source = RandomLengths(0)
    worker = build(proposer=PromptLookup(3), length_source=source)
    assert worker.features == (
        "last_accepted_share",
        "match_agreement",
        "token_acceptance",
        "second_acceptance",
    )
    repeating = worker.add_request(
        Request(REPEATING, max_tokens=8, weight=2.0, floor=1, token_time_target_s=0.5)
    )
    fresh = worker.add_request(Request(list(range(20, 30)), max_tokens=8))
    answers(worker)
    batches = [facts.batch for facts in source.facts]
    assert batches[0].size == 0
    assert batches[0].features.shape == (4, 0)
    assert batches[0].num_prefill_tokens == 16
    both = next(batch for batch in batches if batch.size == 2)
    assert both.request_ids.tolist() == [repeating, fresh]
    assert both.weight is not None
    assert both.weight.tolist() == [2.0, 1.0]
    assert both.floor is not None
    assert both.floor.tolist() == [1, 0]
    assert both.token_time_target_s is not None
    assert both.token_time_target_s.tolist() == [0.5, 0.0]
    for batch in batches:
        assert batch.features.dtype == np.float32
        matched = batch.features[1] > 0
        assert (batch.ceiling[~matched] == 0).all()
    assert both.features[0, 1] == -1.0


def test_last_accepted_share_is_that_of_the_last_drafts() -> None:
    source = RandomLengths(1)
    worker = build(proposer=RandomProposer(4, seed=0, vocabulary=3), length_source=source)
    worker.add_request(Request([1, 2, 3], max_tokens=60))
    answers(worker)
    share = -1.0
    for facts in source.facts:
        if facts.batch.size:
            assert facts.batch.features[0, 0] == pytest.approx(share)
            if facts.num_drafted[0]:
                share = facts.num_accepted[0] / facts.num_drafted[0]


def test_reports_add_up_when_requests_come_and_go() -> None:
    source = RandomLengths(2)
    worker = build(proposer=self_draft(), length_source=source)
    ids = [worker.add_request(Request([1, 2, i], max_tokens=10 + i)) for i in range(8)]
    finished = answers(worker)
    num_tokens = sum(len(finished[i].tokens) for i in ids)
    assert sum(int(f.num_emitted.sum()) for f in source.facts) == num_tokens - len(ids)
    assert sum(f.batch.num_prefill_tokens for f in source.facts) == 3 * len(ids)
    drafted = sum(int(f.num_drafted.sum()) for f in source.facts)
    # First drafts are run before lengths are chosen, and length 0 has no use for them.
    assert drafted < sum(f.num_draft_tokens for f in source.facts) < 1.5 * drafted
    assert drafted == sum(finished[i].num_drafted for i in ids)
    accepted = sum(int(f.num_accepted.sum()) for f in source.facts)
    assert accepted == drafted == sum(finished[i].num_accepted for i in ids)
    for facts in source.facts:
        assert facts.num_draft_forwards >= facts.num_drafted.max(initial=0)
        assert (facts.num_catch_up_tokens > 0) <= (facts.num_draft_forwards > 0)
        assert facts.target_s is not None
        assert facts.draft_s is not None
        assert 0 < facts.target_s + facts.draft_s <= facts.step_s
        assert 0 <= facts.kv_usage <= 1
        assert facts.mode == "ragged"
    context = [f.context_tokens for f in source.facts if f.batch.size == 1]
    assert context == sorted(context)


def test_drafter_catches_up_when_it_was_left_out() -> None:
    lengths = FixedLength(0)
    worker = build(proposer=self_draft(), length_source=lengths)
    worker.add_request(Request(list(range(30)), max_tokens=30))
    for _ in range(7):  # two steps of prompt, five of one token
        worker.step()
    lengths.length = 2
    facts = worker.step().facts
    assert facts is not None
    # Everything but the newest token: 30 of the prompt and all but the last of the answer.
    assert facts.num_catch_up_tokens == 30 + 6 - 1
    assert facts.num_draft_forwards == 2
    assert facts.num_accepted.tolist() == [2]
    facts = worker.step().facts
    assert facts is not None
    assert facts.num_catch_up_tokens == 1  # the second draft was never fed


def test_drafting_ends_for_each_request_when_its_length_is_reached() -> None:
    class Given(RandomLengths):
        def choose(self, batch):  # type: ignore[no-untyped-def]
            choice = super().choose(batch)
            wanted = np.arange(batch.size) % 3 * 2
            return choice._replace(lengths=np.minimum(wanted, batch.ceiling))

    source = Given(0)
    worker = build(proposer=self_draft(), length_source=source)
    for i in range(3):
        worker.add_request(Request([1, 2, i], max_tokens=12))
    answers(worker)
    full = [f for f in source.facts if f.num_drafted.tolist() == [0, 2, 4]]
    assert full
    assert {f.num_draft_forwards for f in full} == {4}
    assert {f.num_draft_tokens for f in full} == {6}


# -- sampling -------------------------------------------------------------------------------------


def sampled_pairs(worker: Worker, num_requests: int) -> np.ndarray:
    """Counts of (second, third) token of answers to one prompt, under other seeds: [V, V]."""
    for seed in range(num_requests):
        sampling = SamplingParams(temperature=0.7, top_k=4, seed=seed)
        worker.add_request(Request([4, 5, 6], max_tokens=3, sampling=sampling))
    counts = np.zeros((VOCABULARY, VOCABULARY))
    for event in answers(worker).values():
        counts[event.tokens[1], event.tokens[2]] += 1
    return counts


def pairs_p_value(counts: np.ndarray, num_requests: int) -> float:
    """Chi-square p-value of the pairs against the model's exact probabilities."""
    model = tiny_model("llama")

    def distribution(tokens: list[int]) -> np.ndarray:
        with torch.inference_mode():
            logits = model(torch.tensor([tokens])).logits[0, -1].numpy() / 0.7
        kept = np.argsort(-logits)[:4]
        p = np.zeros(VOCABULARY)
        p[kept] = np.exp(logits[kept] - logits.max())
        return p / p.sum()

    expected = np.zeros((VOCABULARY, VOCABULARY))
    first = distribution([4, 5, 6])
    for a in np.flatnonzero(first):
        second = distribution([4, 5, 6, a])
        for b in np.flatnonzero(second):
            expected[b] += first[a] * second[b] * distribution([4, 5, 6, a, b])
    expected *= num_requests
    common = expected >= 5
    if counts[expected == 0].sum() > 0:
        return 0.0
    observed = [*counts[common], counts[~common].sum()]
    predicted = [*expected[common], expected[~common].sum()]
    return float(stats.chisquare(observed, predicted).pvalue)


@pytest.mark.parametrize("kind", ["other_weights", "random"])
def test_distribution_is_the_targets_when_speculating(kind: str) -> None:
    proposer = (
        RandomProposer(2, seed=1)
        if kind == "random"
        else DraftModel(ModelRunner(tiny_model("llama", seed=1), 64, 32), 2)
    )
    worker = build(proposer=proposer, max_num_running=64, max_model_len=32, max_prefill_tokens=512)
    counts = sampled_pairs(worker, 3000)
    assert pairs_p_value(counts, 3000) > 1e-3


def test_distribution_is_wrong_when_every_draft_is_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every_draft = lambda tree, drawn: list(range(tree.size))  # noqa: E731
    monkeypatch.setattr(worker_module, "agreeing_path", every_draft)
    proposer = DraftModel(ModelRunner(tiny_model("llama", seed=1), 64, 32), 2)
    worker = build(proposer=proposer, max_num_running=64, max_model_len=32, max_prefill_tokens=512)
    assert pairs_p_value(sampled_pairs(worker, 3000), 3000) < 1e-3


def test_seedless_requests_differ_from_each_other_but_not_from_run_to_run() -> None:
    def run(seed: int) -> list[list[int]]:
        worker = build(seed=seed)
        sampling = SamplingParams(temperature=2.0)
        ids = [worker.add_request(Request([1, 2], max_tokens=8, sampling=sampling)) for _ in "ab"]
        finished = answers(worker)
        return [finished[i].tokens for i in ids]

    assert run(1) == run(1)
    assert run(1) != run(2)
    first, second = run(1)
    assert first != second


def test_requests_are_refused_when_malformed() -> None:
    for bad, message in (
        ({"prompt": []}, "prompt"),
        ({"prompt": [1], "max_tokens": 0}, "max_tokens"),
        ({"prompt": [1], "weight": 0.0}, "weight"),
        ({"prompt": [1], "floor": -1}, "floor"),
        ({"prompt": [1], "stop": ("",)}, "stop"),
    ):
        with pytest.raises(ValueError, match=message):
            Request(**bad)  # type: ignore[arg-type]


def test_clock_is_the_only_source_of_times() -> None:
    ticks = itertools.count()
    source = RandomLengths(0)
    worker = build(proposer=PromptLookup(3), length_source=source, clock=lambda: float(next(ticks)))
    number = worker.add_request(Request(REPEATING, max_tokens=4))
    finished = answers(worker)[number]
    assert finished.latency_s == int(finished.latency_s) > 0
    assert finished.time_to_first_token_s is not None
    assert 0 < finished.time_to_first_token_s < finished.latency_s
    assert all(facts.step_s == int(facts.step_s) for facts in source.facts)
