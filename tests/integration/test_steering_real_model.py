"""The closed loop around a real model: where drafting cannot pay, the controller finds length 0."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import ipc_endpoint

from smartspec.daemon import config
from smartspec.daemon.control_loop import ControlLoop
from smartspec.daemon.event_bus import NullBus
from smartspec.daemon.transport import Server
from smartspec.engine_adapter.link import EngineLink
from smartspec.engine_adapter.messages import Fingerprint, Hello, Limits
from smartspec.engine_adapter.reference import model as models
from smartspec.engine_adapter.reference.draft_model import DraftModel
from smartspec.engine_adapter.reference.model_runner import ModelRunner
from smartspec.engine_adapter.reference.sequence import Request
from smartspec.engine_adapter.reference.worker import Worker

PROMPTS = (
    "Explain why the sky is blue.",
    "Write a short story about a lighthouse keeper.",
    "What is the difference between a lake and a pond?",
)


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(300)
def test_length_0_is_found_when_the_draft_costs_nearly_as_much_as_the_target() -> None:
    try:
        target = models.load(None)
    except models.ModelNotAvailable as error:
        pytest.skip(f"the default model cannot be had: {error}")
    thin = models.without_layers(target.model, models.DEFAULT_DRAFT_DROP_LAYERS)  # 0.85 of its cost
    draft = DraftModel(ModelRunner(thin, 3, 256), 3)
    worker = Worker(
        target.model, target.tokenizer, draft, max_num_running=3, max_model_len=256, seed=0
    )
    with ipc_endpoint() as endpoint:
        settings = config.load(None, {}, {})
        loop = ControlLoop(settings, Server(endpoint), NullBus())
        limits = Limits(max_length=3, max_num_running=3, static_length=3, features=worker.features)
        fingerprint = Fingerprint(target=target.name, proposer=draft.name)
        link = EngineLink(
            endpoint, Hello(engine="real", epoch=1, fingerprint=fingerprint, limits=limits)
        )
        worker.length_source = link
        while not link.stats.num_connections:
            link.idle()
            loop.cycle(0.01)
        for prompt in PROMPTS:
            tokens = target.tokenizer(prompt)["input_ids"]
            worker.add_request(Request(list(tokens), max_tokens=120, ignore_eos=True))
        lengths = []
        while worker.has_work:
            output = worker.step()
            loop.cycle(0.02)
            if output.facts is not None and output.lengths is not None and len(output.lengths):
                lengths.append((output.source, int(np.max(output.lengths))))
        link.close()
        loop.close()
    tried = {length for _, length in lengths}
    assert tried == {0, 1, 2, 3}  # the sweep: it knows what it rejects
    late = [length for source, length in lengths[-40:] if source == "policy"]
    assert len(late) >= 30
    assert np.mean(np.array(late) == 0) >= 0.9
