"""Recorded traces: what they say of a position is what the worker does there."""

from __future__ import annotations

import acceptance_stream
import acceptance_traces
import numpy as np
import pytest
from record_acceptance import Recorder
from tiny_models import tiny_model

from smartspec.engine_adapter.reference import model as models
from smartspec.engine_adapter.reference.draft_model import DraftModel
from smartspec.engine_adapter.reference.model_runner import ModelRunner
from smartspec.engine_adapter.reference.prompt_lookup import PromptLookup
from smartspec.engine_adapter.reference.sequence import Request, SamplingParams
from smartspec.engine_adapter.reference.worker import Worker


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("style", ["lookup", "draft"])
def test_runs_are_what_the_worker_accepts_when_it_drafts(style: str, temperature: float) -> None:
    target = tiny_model("llama", num_layers=3)
    thin = models.without_layers(target, (1,))
    params = SamplingParams(temperature=temperature, seed=3)
    request = Request([5, 6, 7, 5, 6, 7, 5, 6], 60, sampling=params)
    columns = Recorder(target, thin, frozenset()).record([request])[0]
    proposer = PromptLookup(8) if style == "lookup" else DraftModel(ModelRunner(thin, 1, 128), 8)
    worker = Worker(target, None, proposer, max_num_running=1, max_model_len=128)
    worker.add_request(request)
    run = columns[f"{style}_run"]
    position = num_drafting = 0
    while worker.has_work:
        facts = worker.step().facts
        if facts is None or not facts.batch.size:
            continue
        drafted, accepted = int(facts.num_drafted[0]), int(facts.num_accepted[0])
        assert accepted == min(drafted, int(run[position]))
        position += accepted + 1
        num_drafting += drafted > 0
    assert position == len(run) and num_drafting > 3


def test_traces_are_whole_and_balanced_when_read() -> None:
    answers = acceptance_traces.load()
    assert {answer.task for answer in answers} == set(acceptance_traces.TASKS)
    for answer in answers:
        assert answer.lookup_run.max(initial=0) <= acceptance_traces.MAX_LENGTH
        assert (answer.lookup_run[answer.match_length == 0] == 0).all()
        assert ((answer.draft_confidence >= 0.0) & (answer.draft_confidence <= 1.0)).all()


def test_streams_are_equal_when_seeds_are() -> None:
    answers = acceptance_traces.load()[:12]
    one, two = (acceptance_stream.steps(answers, "lookup", 4) for _ in range(2))
    assert len(one) == len(two)
    assert all(np.array_equal(a.accepted, b.accepted) for a, b in zip(one, two, strict=True))
    assert all((step.accepted <= step.drafted).all() for step in one)
