"""TokenAcceptance: rates of acceptance by the token before the draft."""

from __future__ import annotations

import numpy as np
import pytest

from smartspec.engine_adapter.token_acceptance import MEMORY, TokenAcceptance


def test_rates_follow_each_token_when_tokens_differ() -> None:
    rng = np.random.default_rng(0)
    rates = TokenAcceptance()
    truth = np.array([0.1, 0.5, 0.9])
    for _ in range(300):
        tokens = rng.integers(0, 3, 16)
        rates.learn(tokens, rng.random(16) < truth[tokens])
    assert rates.rates([0, 1, 2]) == pytest.approx(truth, abs=0.08)


def test_rate_is_that_of_all_tokens_when_one_was_never_seen() -> None:
    rates = TokenAcceptance()
    rates.learn([5] * 98, [True] * 98)
    assert rates.rates([70_000])[0] == pytest.approx(0.99)
    assert rates.rates([]).shape == (0,)


def test_memory_is_bounded_when_one_token_comes_for_ever() -> None:
    rates = TokenAcceptance()
    for _ in range(200):
        rates.learn([1] * 64, [False] * 64)
    for _ in range(3 * int(MEMORY) // 64):
        rates.learn([1] * 64, [True] * 64)
    assert rates.rates([1])[0] > 0.9
