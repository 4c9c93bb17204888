"""What every estimator must keep to: the rules at the head of estimators/base.py."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import pickle
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from river.checks import common

from smartspec.estimators.acceptance import AcceptanceEstimator
from smartspec.estimators.base import OnlineEstimator
from smartspec.estimators.drift import CumulativeSum
from smartspec.estimators.step_cost import StepCost, StepShape
from smartspec.estimators.tree_acceptance import TreeAcceptance

Observation = tuple[dict[str, Any], float]


def acceptance_stream(seed: int) -> Iterator[Observation]:
    rng = np.random.default_rng(seed)
    while True:
        drafted = int(rng.integers(1, 7))
        x = {
            "request_id": int(rng.integers(0, 40)),
            "bucket": int(rng.integers(0, 3)),
            "drafted": drafted,
            "elsewhere": 1.0,
        }
        yield x, min(int(rng.geometric(0.15)) - 1, drafted)


def cost_stream(seed: int) -> Iterator[Observation]:
    rng = np.random.default_rng(seed)
    while True:
        batch, length = int(rng.integers(1, 33)), int(rng.integers(0, 6))
        x = {
            "batch": batch,
            "verify_tokens": batch * (length + 1),
            "context_tokens": 500 * batch,
            "draft_forwards": length,
            "draft_tokens": batch * length,
        }
        y = 0.02 + 0.0002 * x["verify_tokens"] + 0.003 * length
        yield x, y * math.exp(0.03 * rng.normal())


def tree_stream(seed: int) -> Iterator[Observation]:
    rng = np.random.default_rng(seed)
    while True:
        drafted = int(rng.integers(1, 7))
        x = {
            "request_id": int(rng.integers(0, 40)),
            "bucket": int(rng.integers(0, 3)),
            "drafted": drafted,
        }
        yield x, int((rng.random() < 0.85 / np.arange(1, drafted + 1)).sum())


class Case(NamedTuple):
    make: Callable[[], OnlineEstimator]
    stream: Callable[[int], Iterator[Observation]]


CASES = {
    "AcceptanceEstimator": Case(
        lambda: AcceptanceEstimator(num_buckets=3, max_length=6, max_requests=32),
        acceptance_stream,
    ),
    "TreeAcceptance": Case(
        lambda: TreeAcceptance(num_buckets=3, max_length=6, max_requests=32), tree_stream
    ),
    "StepCost": Case(lambda: StepCost(graph_sizes=(8, 16)), cost_stream),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def learn(estimator: OnlineEstimator, case: Case, count: int, seed: int = 0) -> None:
    for x, y in itertools.islice(case.stream(seed), count):
        estimator.learn_one(x, y)


def answers(estimator: OnlineEstimator, case: Case) -> list[tuple[float, float]]:
    return [
        (estimator.predict_one(x), estimator.predict_std(x))
        for x, _ in itertools.islice(case.stream(99), 50)
    ]


def test_prediction_is_finite_and_not_negative_when_nothing_was_learned(case: Case) -> None:
    for mean, std in answers(case.make(), case):
        assert 0.0 <= mean < math.inf and 0.0 <= std < math.inf


def test_state_and_input_are_untouched_when_predicting(case: Case) -> None:
    estimator = case.make()
    learn(estimator, case, 100)
    x, y = next(case.stream(5))
    given = copy.deepcopy(x)
    before = pickle.dumps(estimator.state())
    estimator.predict_one(x), estimator.predict_std(x)
    estimator.predict_one({**x, "request_id": 10**6})
    assert pickle.dumps(estimator.state()) == before
    estimator.learn_one(x, y)
    assert x == given


def test_prediction_improves_when_more_was_learned(case: Case) -> None:
    def loss(estimator: OnlineEstimator) -> float:
        held_out = itertools.islice(case.stream(7), 400)
        return sum((estimator.predict_one(x) - y) ** 2 for x, y in held_out)

    estimator = case.make()
    untrained = loss(estimator)
    learn(estimator, case, 1000)
    assert loss(estimator) < untrained


@pytest.mark.parametrize("count", [0, 1, 500])
def test_copy_goes_on_bit_for_bit_when_state_travels(case: Case, count: int) -> None:
    estimator = case.make()
    learn(estimator, case, count)
    frame = msgspec.msgpack.encode(estimator.state())
    for restored in (
        type(estimator).from_state(msgspec.msgpack.decode(frame)),
        pickle.loads(pickle.dumps(estimator)),
    ):
        original = pickle.loads(pickle.dumps(estimator))
        assert restored.state() == estimator.state()
        for model in (original, restored):
            learn(model, case, 50, seed=3)
        assert answers(restored, case) == answers(original, case)
        assert restored.state() == original.state()


def test_outcome_is_the_same_when_the_stream_is_the_same(case: Case) -> None:
    first, second = case.make(), case.make()
    learn(first, case, 300)
    learn(second, case, 300)
    assert first.state() == second.state()


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("kind"),
        lambda state: state.update(kind="Another"),
        lambda state: state.pop("params"),
        lambda state: state["params"].update(unknown=1),
        lambda state: state.update(
            {name: None for name in state if name not in ("kind", "params")}
        ),
    ],
)
def test_state_is_refused_when_it_is_damaged(case: Case, damage: Callable[[dict], Any]) -> None:
    estimator = case.make()
    learn(estimator, case, 20)
    state = estimator.state()
    damage(state)
    with pytest.raises(ValueError, match=r"\S"):
        type(estimator).from_state(state)


def test_state_is_refused_when_its_numbers_are_not_finite(case: Case) -> None:
    estimator = case.make()
    learn(estimator, case, 20)
    broken = 0
    for name, value in estimator.state().items():
        packed = value if isinstance(value, dict) and "data" in value else None
        owner = {name: packed} if packed else value if isinstance(value, dict) else {}
        for inner, array in owner.items():
            if not (isinstance(array, dict) and array.get("data")):
                continue
            state = estimator.state()
            target = state if packed else state[name]
            size = len(array["data"]) // 8
            target[inner] = {**array, "data": np.full(size, math.nan).tobytes()}
            broken += 1
            with pytest.raises(ValueError, match="not finite"):
                type(estimator).from_state(state)
    assert broken >= 2


def test_nothing_fails_when_features_appear_and_vanish(case: Case) -> None:
    estimator, rng = case.make(), np.random.default_rng(1)
    for x, y in itertools.islice(case.stream(2), 300):
        names = rng.permutation(list(x))[: rng.integers(0, len(x) + 1)].tolist()
        some = {name: x[name] for name in names}
        if "drafted" not in some and "drafted" in x:
            y = min(y, 6)
        assert math.isfinite(estimator.predict_one(some))
        estimator.learn_one(some, y)
        estimator.learn_one({**x, "new to all": 3.0}, y)
    for mean, std in answers(estimator, case):
        assert 0.0 <= mean < math.inf and 0.0 <= std < math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0, "many", None])
def test_nothing_changes_when_input_is_impossible(case: Case, bad: Any) -> None:
    estimator = case.make()
    learn(estimator, case, 50)
    before = pickle.dumps(estimator.state())
    x, y = next(case.stream(4))
    with pytest.raises(ValueError, match=r"\S"):
        estimator.learn_one(x, bad)
    for name in x.keys() - {"elsewhere"}:
        if name == "request_id" and bad is None:
            continue  # nobody's drafts: the table learns, no request does
        with pytest.raises(ValueError, match=r"\S"):
            estimator.learn_one({**x, name: bad}, y)
        with pytest.raises(ValueError, match=r"\S"):
            estimator.predict_one({**x, name: bad})
    assert pickle.dumps(estimator.state()) == before


@pytest.mark.slow
def test_knowledge_of_others_stays_when_one_observation_repeats_100_000_times(case: Case) -> None:
    estimator = case.make()
    learn(estimator, case, 2000)
    x, _ = next(case.stream(6))
    y = estimator.predict_one(x)
    others = [other for other, _ in itertools.islice(case.stream(8), 200)]
    if "drafted" in x:
        x, y = {"request_id": 1000, "bucket": 1, "drafted": 1}, 1.0
        others = [other for other in others if other["bucket"] != 1]
    before = np.array([estimator.predict_one(other) for other in others])
    size = len(pickle.dumps(estimator))
    for _ in range(100_000):
        estimator.learn_one(x, y)
    after = np.array([estimator.predict_one(other) for other in others])
    assert np.isfinite(after).all()
    assert np.abs(after / before - 1.0).max() < 0.05
    assert estimator.predict_one(x) == pytest.approx(y, rel=0.05)
    assert len(pickle.dumps(estimator)) < size + 1000


def test_cost_per_observation_stays_when_many_were_learned(case: Case) -> None:
    def best(estimator: OnlineEstimator) -> float:
        times = []
        for _ in range(5):
            stream = list(itertools.islice(case.stream(3), 100))
            start = time.perf_counter()
            for x, y in stream:
                estimator.learn_one(x, y)
            times.append(time.perf_counter() - start)
        return min(times)

    young, old = case.make(), case.make()
    learn(young, case, 500)
    learn(old, case, 10_000)
    assert best(old) < 3.0 * best(young)
    assert len(pickle.dumps(old)) < 1.5 * len(pickle.dumps(young)) + 2000


@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.parametrize("make", [StepCost])
def test_costs_are_learned_as_well_when_the_machine_is_another(
    make: type[StepCost], factor: float
) -> None:
    model = make()
    for x, y in itertools.islice(cost_stream(0), 400):
        model.learn_one(x, factor * y)
    errors = [
        abs(model.predict_one(x) / (factor * y) - 1.0)
        for x, y in itertools.islice(cost_stream(1), 200)
    ]
    assert np.mean(errors) < 0.035  # 2.4% of it is the noise


def test_outcome_is_the_same_when_features_come_in_another_order(case: Case) -> None:
    first, second, rng = case.make(), case.make(), np.random.default_rng(3)
    for x, y in itertools.islice(case.stream(2), 200):
        turned = {name: x[name] for name in rng.permutation(list(x)).tolist()}
        first.learn_one(x, y)
        second.learn_one(turned, y)
        assert second.predict_one(turned) == first.predict_one(x)
    assert first.state() == second.state()


def test_nothing_changes_when_a_batch_is_empty() -> None:
    acceptance, cost = CASES["AcceptanceEstimator"].make(), StepCost()
    assert isinstance(acceptance, AcceptanceEstimator)
    for estimator, case in ((acceptance, CASES["AcceptanceEstimator"]), (cost, CASES["StepCost"])):
        learn(estimator, case, 50)

    def known() -> bytes:
        state = acceptance.state()
        state["requests"].pop("tick")  # a step has passed
        return pickle.dumps((state, cost.state()))

    before = known()
    rows, none = acceptance.rows([]), np.zeros(0, np.int64)
    acceptance.learn_many(rows, none, none, none)
    acceptance.learn_presence(rows, np.zeros(0, np.bool_))
    assert acceptance.corrections(rows).shape == acceptance.presence(rows).shape == (0,)
    assert cost.target_curve(StepShape(1, 1), none).shape == (0,)
    assert known() == before


def test_arguments_are_stored_unchanged_when_constructed(case: Case) -> None:
    estimator = case.make()
    arguments = {
        name: parameter.default
        for name, parameter in inspect.signature(type(estimator)).parameters.items()
    }
    built = type(estimator)(**arguments)
    for name, value in arguments.items():
        assert getattr(built, name) is value
    assert set(estimator.state()["params"]) == set(arguments)


RIVER_CHECKS = [
    common.check_repr,
    common.check_str,
    common.check_tags,
    common.check_clone_same_class,
    common.check_clone_is_idempotent,
    common.check_init_has_default_params_for_tests,
    common.check_init_default_params_are_not_mutable,
    common.check_doc,
    common.check_clone_changes_memory_addresses,
    common.check_mutate_can_be_idempotent,
    common.check_pickling_supports_roundtrip,
    common.check_repr_roundtrips_clone,
    common.check_clone_with_new_params_applies,
    common.check_get_params_matches_signature,
]
RIVER_STREAM_CHECKS = [
    common.check_learn_one,
    common.check_pickling,
    common.check_shuffle_features_no_impact,
    common.check_emerging_features,
    common.check_disappearing_features,
    common.check_radically_disappearing_features,
    common.check_predict_one_pure,
    common.check_predict_one_before_any_learn,
    common.check_no_state_aliasing_with_input,
    common.check_clone_is_independent,
    common.check_bounded_memory_growth,
    common.check_seeding_is_idempotent,
]


@pytest.mark.parametrize("model", [StepCost, CumulativeSum])
@pytest.mark.parametrize("check", RIVER_CHECKS, ids=lambda check: check.__name__)
def test_river_accepts_the_estimator_when_it_checks(model: Any, check: Callable) -> None:
    if model is CumulativeSum and check is common.check_tags:
        pytest.skip("river's detectors have no tags")
    check(model())


@pytest.mark.parametrize("model", [StepCost])
@pytest.mark.parametrize("check", RIVER_STREAM_CHECKS, ids=lambda check: check.__name__)
def test_river_accepts_the_regressor_when_it_checks_on_a_stream(
    model: Any, check: Callable
) -> None:
    check(model(), list(itertools.islice(cost_stream(0), 200)))


# -- the detector: it predicts nothing, and what it learns is whether it has alarmed --------------


def residuals(seed: int, count: int) -> list[float]:
    return np.random.default_rng(seed).normal(0.3, 2.0, count).tolist()


def alarms(detector: CumulativeSum, values: list[float]) -> list[bool]:
    found = []
    for value in values:
        detector.update(value)
        found.append(detector.drift_detected)
    return found


def test_detector_goes_on_alike_when_its_state_or_a_pickle_travels() -> None:
    detector, restored = CumulativeSum(), CumulativeSum()
    assert any(alarms(detector, residuals(0, 2000)))
    restored.restore(msgspec.msgpack.decode(msgspec.msgpack.encode(detector.state())))
    pickled = pickle.loads(pickle.dumps(detector))
    expected = alarms(detector, residuals(1, 500))
    assert alarms(restored, residuals(1, 500)) == alarms(pickled, residuals(1, 500)) == expected
    assert restored.state() == pickled.state() == detector.state()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_changes_when_a_residual_is_impossible(bad: float) -> None:
    detector = CumulativeSum()
    alarms(detector, [3.0] * 5)
    before = detector.state()
    with pytest.raises(ValueError, match="finite"):
        detector.update(bad)
    assert detector.state() == before


def test_detector_stays_silent_and_small_when_one_residual_repeats_100_000_times() -> None:
    detector = CumulativeSum()
    size = len(pickle.dumps(detector))
    assert not any(alarms(detector, [0.5] * 100_000))
    assert len(pickle.dumps(detector)) < size + 100
    assert alarms(detector, [4.0] * 7)[-1]
