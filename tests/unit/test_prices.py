"""Stopping and cutting at prices: equal to brute force, and to looking far ahead."""

from __future__ import annotations

import itertools

import numpy as np

from smartspec.engine_adapter.lengths import RAGGED, CostCurve, DraftCost
from smartspec.engine_adapter.prices import Prices


def test_cut_is_that_of_brute_force() -> None:
    rng = np.random.default_rng(0)
    tokens = np.arange(60.0)
    for _ in range(200):
        size = int(rng.integers(1, 4))
        seconds = np.cumsum(rng.random(60) * (rng.random(60) < 0.5)) + 1.0  # any steps
        curve = CostCurve(RAGGED, tokens.tolist(), seconds.tolist())
        drafted = rng.integers(0, 4, size)
        chances = np.cumprod(rng.random((3, size)), axis=0)
        weight, floor = rng.uniform(0.5, 2.0, size), rng.integers(0, 2, size)
        other, value = int(rng.integers(0, 9)), float(rng.uniform(0.0, 3.0))
        prices = Prices(value, (curve,), DraftCost(5.0, 5.0, 5.0), weight, floor, other)

        def worth(lengths: tuple[int, ...]) -> float:
            gain = sum(w * chances[:k, i].sum() for i, (w, k) in enumerate(zip(weight, lengths)))  # noqa: B023,B905
            return float(gain - value * curve.at(size + other + sum(lengths)))  # noqa: B023

        least = np.minimum(floor, drafted)
        able = itertools.product(*(range(a, b + 1) for a, b in zip(least, drafted, strict=True)))
        found = prices.verified(chances, drafted)
        assert (found >= least).all() and (found <= drafted).all()
        assert worth(tuple(found.tolist())) >= max(map(worth, able)) - 1e-9


def test_one_step_ahead_is_far_enough_when_chances_fall() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        rates, shares = rng.random(6), rng.dirichlet(np.ones(6))
        price, forward_s = float(rng.uniform(0.05, 0.6)), float(rng.uniform(0.0, 0.3))
        curve = CostCurve(RAGGED, [0.0, 1.0], [0.0, price])
        prices = Prices(1.0, (curve,), DraftCost(0.0, forward_s))

        def ahead(chance: float, depth: int) -> float:
            """What going on is worth beyond stopping, under the best rule of ``depth`` steps."""
            gain = -forward_s  # noqa: B023
            for rate, share in zip(rates, shares, strict=True):  # noqa: B023
                after = chance * float(rate)
                further = ahead(after, depth - 1) if depth > 1 and after > price else 0.0  # noqa: B023
                gain += share * (max(after - price, 0.0) + max(further, 0.0))  # noqa: B023
            return gain

        for chance in (1.0, 0.7, 0.4):
            gain = float(np.maximum(chance * rates - price, 0.0) @ shares)
            goes_on = bool(prices.pay(np.array([gain]), starting=False)[0])
            assert goes_on == (ahead(chance, 4) > 0)


def test_nobody_is_drafted_for_when_all_together_do_not_pay_the_forward() -> None:
    curve = CostCurve(RAGGED, [0.0, 100.0], [1.0, 2.0])
    prices = Prices(10.0, (curve,), DraftCost(0.02, 0.03, 0.001))
    gain = np.array([0.2, 0.15, 0.005, 0.0])
    # 10 x 0.03 for the forward and 10 x 0.001 for each token: 0.19 + 0.14 pay it, what begins not.
    assert prices.pay(gain, starting=False).tolist() == [True, True, False, False]
    assert not prices.pay(gain, starting=True).any()


def test_price_of_a_token_is_that_of_the_pass_where_it_stands() -> None:
    curve = CostCurve(RAGGED, [0.0, 8.0, 16.0], [1.0, 1.0, 1.8])
    prices = Prices(2.0, (curve,), DraftCost(), num_other_tokens=2)
    assert prices.of_token(2, 0) == 0.0
    assert np.isclose(prices.of_token(2, 6), 0.2)
    assert np.isclose(prices.of_token(4, 0), 0.1)  # from 6 on: half of the next four are free


def test_drafter_catches_up_once_waiting_has_cost_as_much() -> None:
    """Whenever the request ends: at most twice what was best in hindsight, to wait or to read."""
    rng = np.random.default_rng(2)
    curve = CostCurve(RAGGED, [0.0, 100.0], [1.0, 2.0])
    num_joined = 0
    for _ in range(100):
        forward_s, missed = float(rng.uniform(0.0, 0.1)), float(rng.uniform(0.0, 800.0))
        prices = Prices(5.0, (curve,), DraftCost(0.0, forward_s, 0.001, per_catch_up_s=0.002))
        come, has_begun = float(rng.uniform(0.0, 3.0)), False  # tokens a step
        lag, waited, spent = np.array([missed]), np.zeros(1), 0.0
        drafting, waiting = 0.01 * missed, 0.0  # what it takes from the start, and what is let go
        for gain in rng.uniform(0.0, 1.0, (50, 1)):
            brings = max(0.0, float(gain[0]) - 5.0 * (0.001 + forward_s))
            waiting += brings
            joins, waited = prices.join(gain, False, lag, waited)
            has_begun |= bool(joins[0])
            spent += 0.01 * float(lag[0]) if has_begun else brings
            lag = np.array([come]) + (0.0 if has_begun else lag)
            assert spent <= 2 * min(waiting, drafting) + 1e-9
            drafting += 0.01 * come
        num_joined += has_begun
    assert 20 < num_joined < 100


def test_who_waits_to_be_caught_up_with_does_not_pay_for_the_forward() -> None:
    curve = CostCurve(RAGGED, [0.0, 100.0], [1.0, 2.0])
    prices = Prices(10.0, (curve,), DraftCost(0.0, 0.03, 0.0, per_catch_up_s=0.001))
    gain, lag = np.array([0.25, 0.25]), np.array([2.0, 100.0])
    # 0.3 for the forward, of 0.5 that both bring: 0.1 of each is left, 0.02 and 1 are to be paid.
    joins, waited = prices.join(gain, False, lag, np.zeros(2))
    assert not joins.any() and np.allclose(waited, 0.1)
    joins, waited = prices.join(gain, False, lag, np.array([0.0, 0.95]))
    assert joins.all() and not waited.any()
    joins, waited = prices.join(np.array([0.1, 0.1]), False, lag, np.full(2, 5.0))
    assert not joins.any() and np.allclose(waited, 5.0)  # nothing would have been brought
