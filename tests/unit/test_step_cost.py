"""StepCost: coefficients, curves, outliers, changes, what is not known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from smartspec.daemon.state.learned import COST_KNOTS
from smartspec.estimators.least_squares import RecursiveLeastSquares, ResidualFilter
from smartspec.estimators.size_levels import SIZES
from smartspec.estimators.step_cost import MAX_GRIDS, StepCost, StepShape

IDLE = StepShape(1, 1, 0, 500)
NOISE = 0.03


def linear(num_tokens: float) -> float:
    return 0.2e-3 * num_tokens


def convex(num_tokens: float) -> float:
    return 0.02e-3 * num_tokens + 0.3e-3 * max(0.0, num_tokens - 64)


def concave(num_tokens: float) -> float:
    return 0.6e-3 * min(num_tokens, 16) + 0.05e-3 * max(0.0, num_tokens - 16)


class Machine:
    """Steps of random shapes, and the seconds that they take."""

    def __init__(self, seed: int, token_s=linear, scale: float = 1.0, outliers: float = 0.01):
        self.rng = np.random.default_rng(seed)
        self.token_s = token_s
        self.scale = scale
        self.outliers = outliers

    def shape(self) -> StepShape:
        batch, length = int(self.rng.integers(1, 32)), int(self.rng.integers(0, 6))
        rare = self.rng.random() < 0.1
        prefill = int(self.rng.integers(1, 200)) if rare else 0
        context = batch * int(self.rng.integers(100, 1000))
        return StepShape(
            batch, batch * (length + 1), prefill, context, length, length * batch, 2 * batch * rare
        )

    def parts(self, s: StepShape) -> tuple[float, float, float]:
        target = 20e-3 + self.token_s(s.verify_tokens + s.prefill_tokens) + 0.1e-3 * s.batch
        target += 1e-7 * s.context_tokens + 0.05e-3 * s.prefill_tokens
        draft = 1e-3 * s.drafting + 3e-3 * s.draft_forwards + 0.02e-3 * s.draft_tokens
        draft += 0.02e-3 * s.catch_up_tokens
        return target * self.scale, draft * self.scale, 2e-3 * self.scale

    def run(
        self, model: StepCost, steps: int, apart: bool = True, shape: StepShape | None = None
    ) -> np.ndarray:
        """Let ``model`` learn; relative errors against the noiseless truth, before learning."""
        errors = np.empty(steps)
        for i in range(steps):
            s = shape or self.shape()
            target, draft, overhead = self.parts(s)
            truth = target + draft + overhead
            errors[i] = abs(model.seconds(s) - truth) / truth
            if self.rng.random() < self.outliers:
                target *= self.rng.uniform(5, 50)
            target *= math.exp(NOISE * self.rng.normal())
            draft *= math.exp(NOISE * self.rng.normal())
            seen = (target, draft) if apart else (None, None)
            model.observe(s, *seen, target + draft + overhead)
        return errors


@pytest.mark.parametrize("apart", [True, False], ids=["apart", "sum"])
@pytest.mark.parametrize("token_s", [linear, convex, concave])
@pytest.mark.parametrize("scale", [0.05, 1.0, 15.0], ids=["1ms", "20ms", "300ms"])
def test_costs_are_recovered_when_steps_are_noisy_and_some_are_outliers(
    apart: bool, token_s, scale: float
) -> None:
    machine, model = Machine(0, token_s, scale), StepCost()
    errors = machine.run(model, 500, apart)
    assert errors[80:120].mean() < 0.02
    assert errors[-100:].mean() < 0.01
    assert model.noise == pytest.approx(NOISE, rel=0.35)
    assert sum(model.num_clipped.values()) >= 2
    # The floor of a perfect model is 2.4%, the mean of |noise|, and 1% of outliers counted as 1.
    assert model.prediction_error() < 0.045


def test_coefficients_are_recovered_when_target_and_draft_are_seen_apart() -> None:
    machine, model = Machine(1), StepCost()
    machine.run(model, 600)
    fixed_s, forward_s, token_s = model.draft_cost()
    assert fixed_s == pytest.approx(1e-3, rel=0.15)
    assert forward_s == pytest.approx(3e-3, rel=0.03)
    assert token_s == pytest.approx(0.02e-3, rel=0.15)
    shape = StepShape(16, 32, 0, 8000)
    catch_up_s = model.seconds(shape._replace(catch_up_tokens=50)) - model.seconds(shape)
    assert catch_up_s == pytest.approx(50 * 0.02e-3, rel=0.3)
    assert model.overhead_s == pytest.approx(2e-3, rel=0.05)
    curve = model.target_curve(StepShape(16, 16, 0, 8000), [20, 180])
    assert (curve[1] - curve[0]) / 160 == pytest.approx(0.2e-3, rel=0.1)


def test_concave_cost_is_represented_when_the_slope_falls() -> None:
    machine, model = Machine(2, concave), StepCost()
    machine.run(model, 800)
    low, knee, high = model.target_curve(StepShape(8, 8, 0, 4000), [4, 16, 176])
    assert (knee - low) / 12 > 5 * (high - knee) / 160


def test_what_was_learned_stays_when_the_engine_idles_for_100_000_steps() -> None:
    machine, model = Machine(3), StepCost()
    machine.run(model, 500)
    shapes = [machine.shape() for _ in range(100)]
    before = np.array([model.seconds(s) for s in shapes])
    target, draft, overhead = machine.parts(IDLE)
    for _ in range(100_000):
        model.observe(IDLE, target, draft, target + draft + overhead)
    after = np.array([model.seconds(s) for s in shapes])
    assert np.abs(after / before - 1.0).max() < 0.02
    assert model.std(IDLE) > 0.0
    assert machine.run(model, 30).mean() < 0.02
    assert model.num_changes == 0


@pytest.mark.parametrize("apart", [True, False], ids=["apart", "sum"])
def test_load_is_no_surprise_when_the_engine_idled_through_equal_steps_before(apart: bool) -> None:
    machine, model = Machine(21, outliers=0.0), StepCost()
    machine.run(model, 500, apart)
    target, draft, overhead = machine.parts(IDLE)
    seen = (target, draft) if apart else (None, None)
    for _ in range(3000):
        model.observe(IDLE, *seen, target + draft + overhead)
    assert model.std(IDLE) < 0.02 * model.seconds(IDLE)
    inside = 0
    for _ in range(100):
        shape = machine.shape()
        centre, spread = model.seconds(shape), 1.645 * model.std(shape)
        target, draft, overhead = machine.parts(shape)
        target *= math.exp(NOISE * machine.rng.normal())
        draft *= math.exp(NOISE * machine.rng.normal())
        step_s = target + draft + overhead
        inside += abs(step_s - centre) <= spread
        model.observe(shape, *((target, draft) if apart else (None, None)), step_s)
    assert inside >= 75
    assert model.num_changes == 0


def test_load_is_learned_quickly_when_only_idle_steps_were_ever_seen() -> None:
    machine, model = Machine(4), StepCost()
    machine.run(model, 3000, shape=IDLE)
    errors = machine.run(model, 150)
    assert errors[20:50].mean() < 0.05
    assert errors[-50:].mean() < 0.015


@pytest.mark.parametrize("apart", [True, False], ids=["apart", "sum"])
@pytest.mark.parametrize("factor", [1.3, 2.0, 0.5])
def test_new_level_is_followed_within_20_steps_when_the_machine_changes_speed(
    apart: bool, factor: float
) -> None:
    machine, model = Machine(5), StepCost()
    machine.run(model, 500, apart)
    machine.scale = factor
    errors = machine.run(model, 150, apart)
    assert errors[:3].mean() > 0.15
    assert errors[20:40].mean() < 0.07
    assert errors[-50:].mean() < 0.02
    assert model.num_changes >= 1


def test_drift_is_followed_when_costs_rise_by_30_percent_over_300_steps() -> None:
    machine, model = Machine(6), StepCost()
    machine.run(model, 500)
    errors = []
    for i in range(300):
        machine.scale = 1.0 + 0.3 * i / 300
        errors.append(machine.run(model, 1)[0])
    errors.extend(machine.run(model, 100))
    assert max(errors) < 0.12
    assert np.mean(errors) < 0.04
    assert np.mean(errors[-50:]) < 0.02


def test_one_outlier_moves_the_prediction_little_when_the_level_is_known() -> None:
    machine, model = Machine(7, outliers=0.0), StepCost()
    machine.run(model, 300)
    before = model.seconds(IDLE)
    residual = model.observe(IDLE, 1.0, 0.0, 1.002)
    assert residual.clipped
    assert residual.predicted_s == before
    assert model.seconds(IDLE) == pytest.approx(before, rel=0.05)


@pytest.mark.parametrize("apart", [True, False], ids=["apart", "sum"])
def test_outliers_move_predictions_by_less_than_a_percent_when_300_steps_were_seen(
    apart: bool,
) -> None:
    machine, model = Machine(17, outliers=0.0), StepCost()
    machine.run(model, 300, apart)
    probes = [machine.shape() for _ in range(30)]
    for _ in range(20):
        shape = machine.shape()
        target, draft, overhead = machine.parts(shape)
        target *= machine.rng.uniform(5, 50)
        before = np.array([model.seconds(s) for s in (shape, *probes)])
        parts = (target, draft) if apart else (None, None)
        assert model.observe(shape, *parts, target + draft + overhead).clipped
        after = np.array([model.seconds(s) for s in (shape, *probes)])
        assert np.abs(after / before - 1.0).max() < 0.01
        machine.run(model, 20, apart)


def test_one_token_is_learned_from_few_steps_when_it_is_far_cheaper_than_two() -> None:
    rng = np.random.default_rng(18)
    model = StepCost(knots=(2, 16, 32, 64, 256), draft_forwards=False)

    def observe(num_tokens: int) -> None:
        step_s = 0.075 if num_tokens == 1 else 0.1 + 0.009 * (num_tokens - 2)
        step_s *= 1.0 + NOISE * rng.normal()
        model.observe(StepShape(1, num_tokens, 0, 300), None, None, step_s)

    for _ in range(40):
        observe(int(rng.integers(2, 7)))
    for _ in range(3):
        observe(1)
    assert model.seconds(StepShape(1, 1, 0, 300)) == pytest.approx(0.075, rel=0.05)


def test_cost_never_falls_with_tokens_or_context_when_far_outside_what_was_seen() -> None:
    machine, model = Machine(19, concave), StepCost()
    machine.run(model, 300)
    curve = model.target_curve(StepShape(8, 8, 0, 4000), np.arange(1, 5000))
    assert (np.diff(curve) >= 0.0).all() and curve[0] > 0.0
    by_context = [model.seconds(StepShape(8, 8, 0, c)) for c in (0, 100, 10_000, 1_000_000)]
    assert by_context == sorted(by_context) and by_context[0] > 0.0


def test_model_recovers_within_20_steps_when_the_very_first_step_is_an_outlier() -> None:
    machine, model = Machine(8, outliers=0.0), StepCost()
    model.observe(IDLE, 1.2, 0.0, 1.2)
    assert machine.run(model, 25, shape=IDLE)[-1] < 0.1


def test_curve_extrapolates_sanely_when_one_shape_was_ever_seen() -> None:
    machine, model = Machine(9), StepCost()
    shape = StepShape(4, 4, 0, 2000)
    machine.run(model, 300, shape=shape)
    here, far = model.target_curve(shape, [4, 1024])
    assert here == pytest.approx(sum(machine.parts(shape)), rel=0.02)
    assert 1.5 * here < far < 50 * here  # neither free nor forbidding
    assert all(cost > 0.0 for cost in model.draft_cost())
    unseen = StepShape(32, 192, 0, 16_000, 5, 160)
    assert model.std(unseen) / model.seconds(unseen) > 3 * model.std(shape) / model.seconds(shape)


def test_curve_is_a_weak_positive_prior_when_nothing_was_seen() -> None:
    model = StepCost()
    curve = model.target_curve(StepShape(1, 1), [1, 101])
    assert 0.02 < curve[0] < 0.025
    assert (curve[1] - curve[0]) / 100 == pytest.approx(0.2e-3)
    assert all(cost >= 0.0 for cost in model.draft_cost())
    assert not model.coverage().enough.any()


counts = st.integers(0, 400)
seconds = st.floats(1e-6, 10.0)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(counts, st.integers(1, 600), counts, counts, seconds, seconds), max_size=25),
    st.booleans(),
)
def test_curve_is_positive_and_rises_beyond_small_passes_when_observations_are_arbitrary(
    steps: list[tuple[int, int, int, int, float, float]], apart: bool
) -> None:
    model = StepCost(graph_sizes=(8, 16, 32))
    for batch, verify, prefill, drafts, target, draft in steps:
        shape = StepShape(batch, verify, prefill, 10 * batch, drafts % 7, drafts)
        parts = (target, draft) if apart else (None, None)
        model.observe(shape, *parts, target + draft)
    curve = model.target_curve(StepShape(8, 8, 0, 100), np.arange(1, 2000))
    assert (curve > 0.0).all() and np.isfinite(curve).all()
    assert (np.diff(curve[SIZES:]) >= 0.0).all()
    assert all(cost >= 0.0 for cost in model.draft_cost())
    assert model.std(IDLE) > 0.0


def falls(num_tokens: float) -> float:
    """Seconds of a pass on a machine that takes four tokens sooner than three."""
    return 0.05 + 0.004 * num_tokens + (0.015 if num_tokens == 3 else 0.0)


def test_curve_falls_where_it_was_seen_to() -> None:
    model, rng = StepCost(knots=(2, 16)), np.random.default_rng(0)
    for _ in range(600):
        tokens = int(rng.integers(1, 8))
        seconds = falls(tokens) * (1.0 + 0.01 * rng.normal())
        model.observe(StepShape(1, tokens), None, None, seconds)
    sizes = np.arange(1, 8)
    curve = model.target_curve(StepShape(1, 1), sizes)
    assert curve == pytest.approx([falls(n) for n in sizes], rel=0.04)
    tokens, seconds = model.whole_curve(StepShape(1, 1), 1, 40)
    assert np.interp(sizes, tokens, seconds) == pytest.approx(curve)


@pytest.mark.parametrize("apart", [True, False])
def test_level_of_a_size_is_of_the_targets_pass_alone(apart: bool) -> None:
    model, rng = StepCost(knots=(2, 16)), np.random.default_rng(1)
    for _ in range(1200):
        tokens, drafts = int(rng.integers(1, 8)), int(rng.integers(0, 4))
        noise = 1.0 + 0.01 * rng.normal()
        target_s, draft_s = falls(tokens) * noise, 0.02 * drafts * noise
        parts = (target_s, draft_s) if apart else (None, None)
        shape = StepShape(1, tokens, draft_forwards=drafts, draft_tokens=drafts)
        model.observe(shape, *parts, target_s + draft_s)
    for tokens, drafts in ((3, 0), (3, 3), (4, 3)):
        shape = StepShape(1, tokens, draft_forwards=drafts, draft_tokens=drafts)
        wanted = falls(tokens) + 0.02 * drafts
        assert model.seconds(shape) == pytest.approx(wanted, rel=0.04)


def test_prompts_are_priced_apart_when_their_tokens_are_dearer() -> None:
    machine, model = Machine(11), StepCost()
    machine.run(model, 3000)
    assert model.prefill_cost() == pytest.approx(0.05e-3, rel=0.3)
    shape = StepShape(16, 32, 150, 8000)
    seconds = float(model.target_curve(shape, [182])[0]) + 150 * model.prefill_cost()
    assert seconds == pytest.approx(model.seconds(shape), rel=1e-9)


@pytest.mark.parametrize("graph_sizes", [None, (1, 2, 4, 8, 24, 40)])
def test_breakpoints_reproduce_the_curve_when_it_is_interpolated(graph_sizes: tuple | None) -> None:
    machine, model = Machine(10, convex), StepCost(graph_sizes=graph_sizes)
    machine.run(model, 300)
    shape = StepShape(8, 8, 0, 4000)
    points = model.breakpoints(3, 300)
    every = np.arange(3, 301)
    interpolated = np.interp(every, points, model.target_curve(shape, points))
    assert interpolated == pytest.approx(model.target_curve(shape, every), rel=1e-9)
    assert points[0] == 3 and points[-1] == 300


def test_a_whole_curve_is_the_target_curve_at_its_breakpoints_whatever_was_learned() -> None:
    model = StepCost(knots=(16, 64), graph_sizes=(8, 16, 32))
    rng = np.random.default_rng(0)
    for hi in (40, 100, 40, *range(100, 100 + 2 * MAX_GRIDS)):  # the same range, and too many
        shape = StepShape(4, float(rng.integers(4, 90)), context_tokens=400.0)
        model.observe(shape, None, None, 0.01 + 0.001 * shape.verify_tokens)
        tokens, seconds = model.whole_curve(shape, 1, hi)
        assert list(tokens) == model.breakpoints(1, hi).tolist()
        assert seconds.tolist() == model.target_curve(shape, tokens).tolist()
    assert len(model._grids) <= MAX_GRIDS


@pytest.mark.parametrize("far", [0, 100, 700])
def test_a_whole_curve_goes_on_roughly_where_it_is_asked_for_more(far: int) -> None:
    machine, model = Machine(10, convex), StepCost(graph_sizes=(8, 16, 32))
    machine.run(model, 300)
    shape = StepShape(4, 4, 0, 400)
    tokens, seconds = model.whole_curve(shape, 1, 100, far)
    points = model.breakpoints(1, 100).tolist()
    assert tokens.tolist() == points + ([200, 400, 700] if far == 700 else [])
    assert seconds.tolist() == model.target_curve(shape, tokens).tolist()


def test_steps_of_the_curve_are_learned_when_the_engine_pads_to_graph_sizes() -> None:
    sizes = (8, 16, 32, 64)
    rng = np.random.default_rng(11)
    model = StepCost(graph_sizes=sizes)
    for _ in range(600):
        n = int(rng.integers(1, 100))
        padded = next((size for size in sizes if size >= n), n)
        step_s = 2e-3 + 0.1e-3 * padded + 5e-3 * (n > 64)
        model.observe(StepShape(4, n), None, None, step_s * math.exp(NOISE * rng.normal()))
    curve = model.target_curve(StepShape(4, 4), [33, 64, 65])
    assert curve[0] == pytest.approx(2e-3 + 6.4e-3, rel=0.05)
    assert curve[1] == pytest.approx(2e-3 + 6.4e-3, rel=0.05)
    assert curve[2] == pytest.approx(7e-3 + 6.5e-3, rel=0.05)


def test_draft_forwards_cost_nothing_when_the_proposer_has_none() -> None:
    model = StepCost(draft_forwards=False)
    for n in range(200):
        k = n % 4
        model.observe(StepShape(4, 4 + 4 * k, 0, 100, k, 4 * k), 0.02, 0.001 * (k > 0), 0.022)
    fixed_s, forward_s, token_s = model.draft_cost()
    assert forward_s == 0.0
    assert fixed_s + 8 * token_s == pytest.approx(1e-3, rel=0.1)


def test_what_catching_up_costs_is_learned_apart_from_drafting() -> None:
    model, rng = StepCost(), np.random.default_rng(5)
    for _ in range(400):
        depth, missed = int(rng.integers(0, 4)), int(rng.integers(0, 300))
        missed *= depth > 0
        draft_s = (depth > 0) * 1e-3 + 4e-3 * depth + 1e-4 * missed
        shape = StepShape(4, 4 + 4 * depth, 0, 100, depth, 4 * depth, missed)
        target_s = 0.02 * math.exp(NOISE * rng.normal())
        model.observe(shape, target_s, draft_s, target_s + draft_s)
    assert model.catch_up_cost() == pytest.approx(1e-4, rel=0.05)


def test_time_of_drafting_nothing_is_overhead_when_a_lookup_found_no_match() -> None:
    model = StepCost()
    for _ in range(200):
        model.observe(IDLE, 0.02, 0.001, 0.022)
    assert model.overhead_s == pytest.approx(0.002)
    assert model.seconds(IDLE) == pytest.approx(0.022, rel=0.01)


def test_no_change_is_seen_when_drafts_take_no_time_at_all() -> None:
    model, rng = StepCost(draft_forwards=False), np.random.default_rng(0)
    for n in range(2000):
        k = n % 4
        target_s = 0.02 * (1.0 + NOISE * rng.normal())
        model.observe(StepShape(4, 4 + 4 * k, 0, 100, k, 4 * k), target_s, 0.0, target_s)
    assert model.num_changes == 0
    assert sum(model.draft_cost()) * 8 < 1e-5


def test_sums_agree_with_parts_when_an_engine_reports_both_kinds() -> None:
    machine, model = Machine(12, outliers=0.0), StepCost()
    for _ in range(30):
        machine.run(model, 10, apart=True)
        errors = machine.run(model, 10, apart=False)
    assert errors.mean() < 0.01


def test_interval_covers_90_percent_when_it_is_to_cover_90() -> None:
    machine, model = Machine(13, outliers=0.0), StepCost()
    machine.run(model, 200)
    inside = 0
    for _ in range(1000):
        shape = machine.shape()
        centre, spread = model.seconds(shape), 1.645 * model.std(shape)
        target, draft, overhead = machine.parts(shape)
        step_s = (target + draft) * math.exp(NOISE * machine.rng.normal()) + overhead
        inside += abs(step_s - centre) <= spread
        model.observe(shape, None, None, step_s)
    assert 0.86 < inside / 1000 < 0.95


def test_coverage_counts_bands_and_drafting_when_steps_are_seen() -> None:
    model = StepCost(knots=(16, 64), enough=2)
    for shape in (
        StepShape(4, 16),
        StepShape(4, 17),
        StepShape(4, 12, 6),
        StepShape(9, 90, 0, 0, 1, 81),
    ):
        model.observe(shape, None, None, 0.02)
    seen = model.coverage()
    assert seen.edges == (0.0, 16.0, 64.0, math.inf)
    assert seen.counts.tolist() == [[1, 0], [2, 0], [0, 1]]
    assert seen.enough.tolist() == [[False, False], [True, False], [False, False]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_nothing_changes_when_a_step_is_impossible(bad: float) -> None:
    model = StepCost()
    model.observe(IDLE, 0.02, 0.0, 0.02)
    before = model.state()
    for field in range(len(StepShape._fields)):
        shape = StepShape(*(bad if i == field else 1 for i in range(len(StepShape._fields))))
        with pytest.raises(ValueError, match="counts"):
            model.observe(shape, 0.02, 0.0, 0.02)
    for times in ((bad, 0.0, 0.02), (0.02, bad, 0.02), (0.02, 0.0, bad), (None, None, bad)):
        with pytest.raises(ValueError, match="_s must"):
            model.observe(IDLE, *times)
    with pytest.raises(ValueError, match="step_s"):
        model.observe(IDLE, None, None, 0.0)
    with pytest.raises(ValueError, match="token"):
        model.observe(StepShape(0, 0), None, None, 0.02)
    assert model.state() == before


@pytest.mark.parametrize(
    "arguments",
    [
        {"knots": (16, 16)},
        {"graph_sizes": (0, 4)},
        {"forgetting": 0.0},
        {"prior_fixed_s": math.nan},
    ],
)
def test_arguments_are_refused_when_they_make_no_model(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        StepCost(**arguments)


def test_solution_is_the_constrained_optimum_when_some_coefficients_would_be_negative() -> None:
    rng = np.random.default_rng(14)
    for _ in range(100):
        rows = rng.normal(size=(30, 6)) + 1.0
        y = rows @ rng.normal(size=6) + 0.1 * rng.normal(size=30)
        solver = RecursiveLeastSquares(np.zeros(6), 1e-9 * np.eye(6), forgetting=1.0)
        for row, value in zip(rows, y, strict=True):
            solver.add(row, float(value), 1.0)
            solver.solve()
        expected, _ = nnls(rows, y)
        assert solver.coef == pytest.approx(expected, abs=1e-6)


def test_precision_is_kept_across_and_bounded_along_when_one_row_repeats() -> None:
    solver = RecursiveLeastSquares(np.zeros(3), np.eye(3), forgetting=0.9)
    row, across = np.array([1.0, 1.0, 0.0]), np.array([1.0, -1.0, 0.0])
    for _ in range(10_000):
        solver.add(row, 2.0, 1.0)
    solver.solve()
    assert solver.leverage(across) == pytest.approx(2.0)
    assert solver.leverage(np.array([0.0, 0.0, 1.0])) == pytest.approx(1.0)
    assert 1 / solver.leverage(row) == pytest.approx(1 / (1 - 0.9) + 0.5)  # and the prior's
    assert solver.coef[:2].sum() == pytest.approx(2.0 * 10 / (10 + 0.5))


def test_solver_recovers_when_its_precision_is_ruined() -> None:
    solver = RecursiveLeastSquares(np.ones(2), np.eye(2), forgetting=0.98)
    solver.precision[0, 0] = math.nan
    solver.solve()
    assert solver.coef.tolist() == [1.0, 1.0]
    solver.add(np.array([1.0, 0.0]), 3.0, 1e6)
    solver.solve()
    assert solver.coef == pytest.approx([3.0, 1.0], rel=1e-3)


def test_prior_counts_for_less_when_the_machine_is_quiet() -> None:
    def distance(noise: float) -> float:
        rng = np.random.default_rng(20)
        model = StepCost(knots=(16,))
        for _ in range(15):
            n = int(rng.integers(2, 12))
            step_s = (0.02 + 0.004 * n) * (1.0 + noise * rng.normal())
            model.observe(StepShape(1, n), None, None, step_s)
        low, high = model.target_curve(StepShape(1, 1), [2, 12])
        return abs((high - low) / 10 / 0.004 - 1.0)

    assert distance(0.003) < 0.05 < distance(0.1)


def test_steps_are_believed_when_they_are_many_times_what_the_prior_expects() -> None:
    # A knee at 40 tokens, met after three steps before it: what is off is the prior, not the steps.
    model = StepCost(knots=COST_KNOTS)

    def seconds(num_tokens: int) -> float:
        return 0.02 + 0.0002 * num_tokens + 0.004 * max(0, num_tokens - 40)

    for num_tokens in [20, 20, 20, *[60, 40, 20, 100, 80] * 6]:
        took_s = seconds(num_tokens)
        model.observe(StepShape(20, num_tokens, 0, 4000), took_s, 0.0, took_s + 1e-4)
    for num_tokens in (20, 60, 80, 100):
        expected_s = model.seconds(StepShape(20, num_tokens, 0, 4000))
        assert expected_s == pytest.approx(seconds(num_tokens), rel=0.3)


def test_alarm_is_raised_soon_on_a_shift_and_not_when_outliers_come_singly() -> None:
    rng = np.random.default_rng(15)
    residuals = ResidualFilter()
    for _ in range(20_000):
        factor = rng.uniform(5, 50) if rng.random() < 0.01 else 1.0
        assert not residuals.judge(1.0, factor * math.exp(NOISE * rng.normal()), 0.0).shifted
    assert residuals.noise == pytest.approx(NOISE, rel=0.3)
    shifted = [
        residuals.judge(1.0, 1.3 * math.exp(NOISE * rng.normal()), 0.0).shifted for _ in range(8)
    ]
    assert any(shifted)


@pytest.mark.parametrize(
    "damage",
    [
        {"first_count": 0.0, "counts": [0, 0]},
        {"counts": [3]},
        {"counts": [-1, 3]},
        {"variances": [0.1, math.nan]},
    ],
)
def test_noise_is_refused_when_its_state_is_damaged(damage: dict) -> None:
    residuals = ResidualFilter(num_bands=2)
    residuals.judge(1.0, 1.1, 0.0, band=1)
    before = residuals.state()
    with pytest.raises(ValueError, match=r"\S"):
        residuals.restore({**before, **damage})
    assert residuals.state() == before


def test_coefficients_move_with_every_eighth_step_once_settled_and_at_once_after_a_change() -> None:
    machine, model, shape = Machine(3, outliers=0.0), StepCost(), StepShape(8, 24, 0, 4000, 2, 16)

    def moves(steps: int) -> list[bool]:
        found = []
        for _ in range(steps):
            before = model._solver.coef
            machine.run(model, 1)
            found.append(model._solver.coef is not before)
        return found

    assert all(moves(200))
    assert sum(moves(80)) == 10
    machine.scale = 1.5
    for _ in range(40):
        before, changes = model.seconds(shape), model.num_changes
        machine.run(model, 1)
        if model.num_changes > changes:
            assert model.seconds(shape) > 1.1 * before
            return
    raise AssertionError("no change of level was told")


@pytest.mark.parametrize("first_s", [30.0, 1e-5])
def test_level_is_that_of_most_of_the_first_steps(first_s: float) -> None:
    """What was never run stays as uncertain as the machine is fast, and not as its first step."""
    model, usual = StepCost(), StepCost()
    idle, busy = StepShape(batch=4, verify_tokens=4), StepShape(batch=4, verify_tokens=24)
    model.observe(idle, None, None, first_s)
    for _ in range(40):
        model.observe(idle, None, None, 0.02)
        usual.observe(idle, None, None, 0.02)
    assert model.seconds(idle) == pytest.approx(0.02, rel=0.05)
    assert model.seconds(busy) == pytest.approx(usual.seconds(busy), rel=0.1)
    assert model.log_ratio_std(busy, idle) == pytest.approx(
        usual.log_ratio_std(busy, idle), rel=0.3
    )
