"""What is put into vLLM's scheduler, without vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from smartspec.engine_adapter.lengths import Choice, CostCurve, DraftCost
from smartspec.engine_adapter.levels import Levels
from smartspec.engine_adapter.link import Ready
from smartspec.engine_adapter.vllm.facts import METHODS
from smartspec.engine_adapter.vllm.steering import Steering


class Dear:
    """A source by which no draft is worth its verification."""

    may_steer = True

    def prepare(self, batch: Any, features: Any = None) -> None:
        curve = CostCurve("ragged", [0.0, 100.0], [0.0, 100.0])
        self.levels = Levels(
            np.log([[0.5]]), np.ones(batch.size), None, None, 3, 1.0, 1, curve, DraftCost()
        )
        self.levels.expect(np.zeros(features.shape[1], np.intp))

    def ready(self) -> Ready:
        return Ready(Choice(np.empty(0, np.int64)), self.levels)


def _request(name: str, drafts: list[int]) -> SimpleNamespace:
    return SimpleNamespace(
        request_id=name,
        is_prefill_chunk=False,
        sampling_params=object(),
        resumable=False,
        max_tokens=100,
        num_computed_tokens=4,
        _output_token_ids=[5],
        _all_token_ids=[3, 4, 5],
        spec_token_ids=drafts,
    )


@pytest.mark.parametrize("method", ["custom_class", "suffix", "ngram"])
def test_lists_that_a_proposer_may_keep_are_not_cut_in_place(method: str) -> None:
    drafts = [1, 2, 3]
    requests = [_request("a", drafts), _request("b", drafts if method == "custom_class" else [4])]
    scheduler = SimpleNamespace(
        running=requests,
        waiting=[],
        requests={request.request_id: request for request in requests},
        num_spec_tokens=3,
        max_num_running_reqs=2,
        max_num_scheduled_tokens=64,
        dynamic_sd_lookup=None,
        scheduler_config=SimpleNamespace(async_scheduling=False),
        kv_cache_manager=SimpleNamespace(usage=0.0),
    )
    source: Any = Dear()
    steering = Steering(scheduler, source, METHODS[method])
    steering.while_running(None)
    steering.before_schedule()
    assert [request.spec_token_ids for request in requests] == [[], []]
    assert drafts == ([] if method == "ngram" else [1, 2, 3])
    assert scheduler.dynamic_sd_lookup is not None
