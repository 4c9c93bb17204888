"""vLLM under lengths that change at random, per request and step: same tokens, lengths obeyed.

64 greedy requests in fp32 join, leave and are aborted; prompts come in chunks, prefixes are
shared, the KV room is too small for all, some answers follow a JSON schema.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from serve import MAX_BATCHED, NUM_REQUESTS, is_aborted
from serving import assert_same, served

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def test_schedule_of_requests_is_a_hard_one(plain: dict[str, Any]) -> None:
    """What the other tests rely on."""
    assert len(plain["answers"]) == NUM_REQUESTS == 64
    assert plain["preemptions"] > 0
    assert plain["prefix_hits"] > 0
    assert max(map(len, plain["prompts"].values())) > MAX_BATCHED
    assert sum(is_aborted(number) for number in range(NUM_REQUESTS)) == 4
    assert len(plain["logprobs"]) == 8


@pytest.mark.parametrize("method", ["ngram", "draft_model", "custom_class"])
def test_tokens_are_those_of_no_speculation(
    method: str, plain: dict[str, Any], tmp_path: Path
) -> None:
    told = served(
        tmp_path / "told.json",
        method,
        "random",
        "--seed=1",
        SMARTSPEC_TEST_ANSWERS=str(plain["sequences"]),
        SMARTSPEC_TEST_ACCEPTANCE="0.7",
    )
    assert told["refusal"] == ""
    assert told["errors"] == 0
    assert_same(plain, told)
    assert len(told["answers"]) == NUM_REQUESTS
    # It was tested: lengths were cut, drafts accepted and refused, requests preempted.
    drafted, accepted = told["ours"]
    seen = told["seen"]
    assert seen["shortened"] > 100
    assert 100 < accepted < drafted - 100
    assert told["preemptions"] > 0
    assert told["steered_steps"] > 0.7 * told["steps"]
    # Lengths are obeyed in the same step; drafts that exist are not cut further.
    assert seen["too_long"] == seen["too_short"] == 0
    assert told["ours"] == told["theirs"]
    assert told["blocks_free"] == plain["blocks_free"]


def test_answers_to_a_schema_are_json(plain: dict[str, Any]) -> None:
    """So that the schema's requests do end, and do not merely agree."""
    from transformers import AutoTokenizer
    from vllm_models import model_dir

    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    ended = 0
    for number in range(3, NUM_REQUESTS, 8):
        [answer] = plain["answers"][f"{number}.0"]
        try:
            told = json.loads(tokenizer.decode(answer, skip_special_tokens=True))
        except ValueError:
            continue  # cut by its longest length
        ended += sorted(told) == ["name", "number"]
    assert ended >= 4
