"""A vLLM proposer of tunable acceptance: it knows the answers, and spoils some of its drafts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

ANSWERS = "SMARTSPEC_TEST_ANSWERS"  #: file of whole sequences: prompt and answer
ACCEPTANCE = "SMARTSPEC_TEST_ACCEPTANCE"  #: probability that a draft is left as it should be


class Oracle:
    """For ``speculative_config={"method": "custom_class", "model": "proposer.Oracle"}``."""

    def __init__(self, vllm_config: Any) -> None:
        self.length = vllm_config.speculative_config.num_speculative_tokens
        self.acceptance = float(os.environ[ACCEPTANCE])
        self.sequences = [np.array(s) for s in json.loads(Path(os.environ[ANSWERS]).read_text())]
        self.rng = np.random.default_rng(0)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """There is none."""

    def propose(
        self, sampled: list[list[int]], num_tokens: Any, token_ids: Any, **kwargs: Any
    ) -> list[list[int]]:
        drafts = []
        for i, new in enumerate(sampled):
            known = token_ids[i, : num_tokens[i]] if new else None
            drafts.append([] if known is None else self._continue(known))
        return drafts

    def _continue(self, known: Any) -> list[int]:
        size = len(known)
        for sequence in self.sequences:
            if len(sequence) > size and np.array_equal(sequence[:size], known):
                right = sequence[size : size + self.length]
                spoiled = self.rng.random(len(right)) >= self.acceptance
                return np.where(spoiled, right + 1, right).tolist()
        return []
