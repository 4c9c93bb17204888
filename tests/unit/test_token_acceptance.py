"""TokenAcceptance: rates of acceptance by the token before the draft."""

from __future__ import annotations

import numpy as np
import pytest

from smartspec.engine_adapter.token_acceptance import MEMORY, CopyAcceptance, TokenAcceptance


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


@pytest.mark.parametrize("outcome", [True, False])
def test_rates_stay_finite_when_every_draft_for_a_long_time_came_out_alike(outcome: bool) -> None:
    rates = CopyAcceptance()
    tokens = np.ones(100_000, np.int64)
    for _ in range(250):  # each fades what was known before by more than a hundredfold
        rates.learn(tokens, tokens, np.full(len(tokens), outcome))
    told = rates.rates([1, 2], [1, 2])
    assert np.isfinite(told).all() and ((told > 0.9) == outcome).all()
