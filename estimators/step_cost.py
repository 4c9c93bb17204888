"""What a step of a given shape costs on this machine, learned from served steps.

    seconds = overhead + target + draft
    target  = c_0 + c_batch B + sum_s c_s N_s + c_verify V + c_ctx C + c_prefill P + c_eager [N > G]
    draft   = d_0 [drafting] + d_forward D + d_token n + d_catch_up m

B decoding requests; N = V + P tokens of the target's pass, V verified and P of prompts, rounded up
to a captured graph size where the engine pads; N_s the tokens of N that lie in segment s between
two knots; C context tokens; D sequential draft forwards of n tokens; m tokens that the drafter had
to catch up on. It is the linear model of SmartSpec (arXiv 2406.14066, T = c_ctx N_context + c_tok
N_batched + c_0) with what practice adds to it. A slope per segment, rather than hinges on one
slope, makes ">= 0 for every coefficient" the same as "the curve never falls with N", while concave
(mixture of experts) and convex (compute-bound) shapes both remain possible. Neighbouring slopes
are drawn together weakly, so that the curve goes on straight where nothing was seen.

Noise is relative: an observation weighs 1 / seconds^2. Engines that time target and draft apart
feed the two parts of the model; those that know only the sum feed all of it at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from river.base import Regressor

from smartspec.estimators.base import F64, State, non_negative
from smartspec.estimators.least_squares import RecursiveLeastSquares, ResidualFilter

RESOLUTION_S = 2e-5  #: times below this are noise of clock and operating system
_AFTER_SHIFT = (0.1, 0.25)  #: precision kept, variance of the common factor; see `loosen`


def _weight(predicted: float, observed: float) -> float:
    # The larger of the two: an outlier seen before the model knows better (a first step that
    # compiles) then weighs next to nothing, at the price of a bias of one noise variance.
    return max(predicted, observed, RESOLUTION_S) ** -2


class StepCostRegressor(Regressor):
    """Seconds as a non-negative combination of named features; a river regressor.

    Recursive least squares with directional forgetting, multiplicative noise that is learned,
    clipping of outliers and recognition of changed levels: see least_squares.py. Features are
    given slots as they appear; an absent feature counts as 0.

    Parameters
    ----------
    forgetting : share of the old information kept along the direction of a new observation
    clip_at : standard deviations at which an observation is drawn in
    max_features : a feature beyond these raises ValueError

    >>> model = StepCostRegressor()
    >>> for n in range(1, 200):
    ...     model.learn_one({"tokens": n % 7}, 0.020 + 0.001 * (n % 7))
    >>> round(model.predict_one({"tokens": 10}), 4)
    0.03
    """

    def __init__(
        self, forgetting: float = 0.98, clip_at: float = 4.0, max_features: int = 64
    ) -> None:
        self.forgetting = forgetting
        self.clip_at = clip_at
        self.max_features = max_features
        self._slots: dict[Any, int] = {}
        self._scales: list[float] = [1.0]
        self._solver: RecursiveLeastSquares | None = None
        self._filter = ResidualFilter(clip_at)
        self._prior_precision = 1.0

    def _row(self, x: dict[Any, Any]) -> F64:
        row = np.zeros(len(self._scales))
        row[0] = 1.0
        for name, value in x.items():
            number = non_negative(str(name), value)
            slot = self._slots.get(name)
            if slot is not None:
                row[slot] = number / self._scales[slot]
        return row

    def learn_one(self, x: dict[Any, Any], y: Any) -> None:
        """Take in that features ``x`` (>= 0) took ``y`` seconds (>= 0)."""
        seconds = non_negative("y", y)
        self._row(x)  # refuses impossible values before anything has changed
        new = sorted((str(n), n) for n, v in x.items() if n not in self._slots and float(v) > 0.0)
        if len(self._slots) + len(new) > self.max_features:
            raise ValueError(f"more than {self.max_features} features")
        if self._solver is None:
            # A contribution of 3 times the first observation is one deviation of the prior.
            self._prior_precision = (0.03 / max(seconds, RESOLUTION_S)) ** 2
            prior = np.array([[self._prior_precision]])
            self._solver = RecursiveLeastSquares(np.zeros(1), prior, self.forgetting)
        for _, name in new:
            self._slots[name] = len(self._scales)
            self._scales.append(float(x[name]))
            self._solver.grow(self._prior_precision)
        row = self._row(x)
        solver = self._solver
        predicted = max(float(row @ solver.coef), RESOLUTION_S)
        if self._filter.count == 0:
            predicted = max(seconds, RESOLUTION_S)  # nothing was predicted yet
        leverage = solver.leverage(row) / predicted**2
        verdict = self._filter.judge(predicted, seconds, leverage)
        if verdict.shifted:
            solver.loosen(*_AFTER_SHIFT)
        solver.add(row, verdict.value, _weight(predicted, verdict.value))
        solver.solve()

    def predict_one(self, x: dict[Any, Any]) -> float:
        """Expected seconds of features ``x``; 0 before anything was learned."""
        row = self._row(x)
        return float(row @ self._solver.coef) if self._solver is not None else 0.0

    def predict_std(self, x: dict[Any, Any]) -> float:
        """Standard deviation of the seconds of one step of features ``x``."""
        row = self._row(x)
        if self._solver is None:
            return 0.0
        predicted = float(row @ self._solver.coef)
        return self._filter.noise * math.sqrt(predicted**2 + self._solver.leverage(row))

    @property
    def num_clipped(self) -> int:
        """Observations that were drawn in."""
        return self._filter.num_clipped

    def state(self) -> State:
        return {
            "kind": type(self).__name__,
            "params": {
                "forgetting": self.forgetting,
                "clip_at": self.clip_at,
                "max_features": self.max_features,
            },
            "slots": [[name, slot] for name, slot in self._slots.items()],
            "scales": list(self._scales),
            "prior_precision": self._prior_precision,
            "filter": self._filter.state(),
            "solver": None if self._solver is None else self._solver.state(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        try:
            if state["kind"] != cls.__name__:
                raise ValueError(f"state of a {state['kind']}, expected {cls.__name__}")
            model = cls(**state["params"])
            model._slots = {name: int(slot) for name, slot in state["slots"]}
            model._scales = [non_negative("scale", scale) for scale in state["scales"]]
            size = len(model._scales)
            if sorted(model._slots.values()) != list(range(1, size)) or 0.0 in model._scales:
                raise ValueError("features do not match their slots")
            model._prior_precision = non_negative("prior_precision", state["prior_precision"])
            model._filter.restore(state["filter"])
            if state["solver"] is not None:
                solver = RecursiveLeastSquares(np.zeros(size), np.eye(size), model.forgetting)
                solver.restore(state["solver"], size)
                model._solver = solver
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a state of {cls.__name__}: {error!r}") from None
        return model


class StepShape(NamedTuple):
    """What a step had to do, in counts (>= 0)."""

    batch: float  #: decoding requests
    verify_tokens: float  #: tokens verified for them: sum of k_i + 1, prompts not included
    prefill_tokens: float = 0.0  #: prompt tokens that shared the target's pass
    context_tokens: float = 0.0  #: KV entries read
    draft_forwards: float = 0.0  #: sequential draft passes
    draft_tokens: float = 0.0  #: tokens drafted in them
    catch_up_tokens: float = 0.0  #: tokens that the drafter processed to be in step again

    @property
    def drafting(self) -> bool:
        return self.draft_forwards > 0.0 or self.draft_tokens > 0.0


class Residual(NamedTuple):
    """How a step's time compared with what was expected of it."""

    predicted_s: float
    observed_s: float
    clipped: bool  #: an outlier: learned from only up to the clipping limit


class Coverage(NamedTuple):
    """Steps seen, by tokens verified and by whether drafting took part."""

    edges: tuple[float, ...]  #: band i holds edges[i] < N <= edges[i + 1]; the last is open
    counts: npt.NDArray[np.int64]  #: [num_bands, 2]; column 1: with drafting
    enough: npt.NDArray[np.bool_]  #: [num_bands, 2]


class _Term(NamedTuple):
    scale: float  #: counts that make one unit of the feature
    prior: float  #: expected contribution of a unit, as a share of the prior's fixed cost


_TARGET_TERMS = {
    "fixed": _Term(1.0, 1.0),
    "batch": _Term(16.0, 0.02),
    "verify": _Term(16.0, 0.04),
    "context": _Term(4096.0, 0.05),
    "prefill": _Term(16.0, 0.0),
    "eager": _Term(1.0, 0.0),
}
_DRAFT_TERMS = {
    "drafting": _Term(1.0, 0.05),
    "forwards": _Term(1.0, 0.1),
    "tokens": _Term(16.0, 0.02),
    "catch_up": _Term(64.0, 0.05),
}
_SEGMENT = _Term(16.0, 0.12)
_FIXED, _BATCH, _VERIFY, _CONTEXT, _PREFILL, _EAGER = range(6)
_DRAFTING, _FORWARDS, _TOKENS, _CATCH_UP = range(6, 10)
_SEGMENTS = 10  # and onwards: one per segment
_NOISE = 0.1  # relative deviation of an observation that the prior's weight is reckoned against


def _prior(num_segments: int, fixed_s: float) -> tuple[F64, F64]:
    """Prior mean and precision: a shape known within some factors, a level known hardly at all."""
    terms = [*_TARGET_TERMS.values(), *_DRAFT_TERMS.values(), *[_SEGMENT] * num_segments]
    share = np.array([term.prior for term in terms])
    mean = fixed_s * share
    spread = 3.0 * fixed_s * np.maximum(share, 0.05) / _NOISE
    covariance = np.diag(spread**2) + (30.0 / _NOISE) ** 2 * np.outer(mean, mean)
    precision = np.linalg.inv(covariance)
    # Slopes of neighbouring segments differ by about as much as a slope is large.
    differences = np.zeros((num_segments - 1, len(terms)))
    for i in range(num_segments - 1):
        differences[i, _SEGMENTS + i : _SEGMENTS + i + 2] = (1.0, -1.0)
    stiffness = (_NOISE / (fixed_s * _SEGMENT.prior)) ** 2
    precision += stiffness * differences.T @ differences
    return mean, 0.5 * (precision + precision.T)


class _RobustMean:
    """Discounted mean of a skewed quantity, its outliers drawn in to 3 mean deviations."""

    def __init__(self, window: int = 100) -> None:
        self.window = window
        self.value = 0.0
        self.deviation = 0.0
        self.count = 0

    def add(self, value: float) -> None:
        self.count += 1
        step = 1.0 / min(self.count, self.window)
        error = value - self.value
        if self.count > 10:
            limit = 3.0 * self.deviation + 0.01 * self.value
            error = min(max(error, -limit), limit)
            # A change of level drives every value to the limit, and so the limit up.
            step = max(step, 0.05)
        self.value += step * error
        self.deviation += step * (abs(error) - self.deviation)


class StepCost(Regressor):
    """Step cost with the terms of this module's head: what the daemon asks for curves.

    Parameters
    ----------
    knots : token counts at which the slope in N may change
    graph_sizes : token counts of captured graphs; the engine pads a pass up to the next of them,
        and runs a larger pass without a graph. Empty: no padding
    draft_forwards : False for proposers whose depth costs no sequential passes (prompt lookup)
    forgetting, clip_at : as in `StepCostRegressor`
    prior_fixed_s : the prior's cost of an empty step; with 1% of it per token (20 ms and 0.2 ms a
        token). The first few observations replace its level, and it weighs little in its shape
    enough : steps that make a cell of `coverage` seen
    """

    def __init__(
        self,
        knots: Sequence[int] = (16, 64, 256),
        graph_sizes: Sequence[int] = (),
        draft_forwards: bool = True,
        forgetting: float = 0.98,
        clip_at: float = 4.0,
        prior_fixed_s: float = 0.02,
        enough: int = 3,
    ) -> None:
        for name, counts in (("knots", knots), ("graph_sizes", graph_sizes)):
            rising = all(a < b for a, b in zip(counts, counts[1:], strict=False))
            if not rising or any(n < 1 for n in counts):
                raise ValueError(f"{name} must be rising token counts >= 1, got {counts}")
        if not 0.0 < forgetting <= 1.0:
            raise ValueError(f"forgetting must be in (0, 1], got {forgetting}")
        if not 0.0 < prior_fixed_s < math.inf:
            raise ValueError(f"prior_fixed_s must be > 0, got {prior_fixed_s}")
        self.knots = knots
        self.graph_sizes = graph_sizes
        self.draft_forwards = draft_forwards
        self.forgetting = forgetting
        self.clip_at = clip_at
        self.prior_fixed_s = prior_fixed_s
        self.enough = enough
        self._low = np.array([0.0, *knots])
        self._width = np.array([*np.diff(self._low), math.inf])
        self._graphs = np.array([*graph_sizes], np.float64)
        mean, precision = _prior(len(self._low), prior_fixed_s)
        if not draft_forwards:
            mean[_FORWARDS] = 0.0
        self._solver = RecursiveLeastSquares(mean, precision, forgetting)
        self._filters = {name: ResidualFilter(clip_at) for name in ("target", "draft", "step")}
        self._overhead = _RobustMean()
        self._counts = np.zeros((len(self._low), 2), np.int64)
        self._error = 0.0
        self._num_observed = 0

    # -- features ---------------------------------------------------------------------------

    def _padded(self, num_tokens: F64) -> F64:
        """Tokens that the target computes for ``num_tokens``."""
        if not len(self._graphs):
            return num_tokens
        index = np.searchsorted(self._graphs, num_tokens)
        inside = index < len(self._graphs)
        size = self._graphs[np.minimum(index, len(self._graphs) - 1)]
        padded: F64 = np.where(inside, size, num_tokens)
        return padded

    def _segments(self, num_tokens: F64) -> F64:
        """[..., num_segments]: units of ``num_tokens`` in each segment."""
        units: F64 = np.clip(num_tokens[..., None] - self._low, 0.0, self._width) / _SEGMENT.scale
        return units

    def _row(self, shape: StepShape) -> F64:
        num_tokens = shape.verify_tokens + shape.prefill_tokens
        row = np.empty(_SEGMENTS + len(self._low))
        row[:_SEGMENTS] = (
            1.0,
            shape.batch / _TARGET_TERMS["batch"].scale,
            shape.verify_tokens / _TARGET_TERMS["verify"].scale,
            shape.context_tokens / _TARGET_TERMS["context"].scale,
            shape.prefill_tokens / _TARGET_TERMS["prefill"].scale,
            float(len(self._graphs) > 0 and num_tokens > self._graphs[-1]),
            float(shape.drafting),
            shape.draft_forwards / _DRAFT_TERMS["forwards"].scale if self.draft_forwards else 0.0,
            shape.draft_tokens / _DRAFT_TERMS["tokens"].scale,
            shape.catch_up_tokens / _DRAFT_TERMS["catch_up"].scale,
        )
        row[_SEGMENTS:] = self._segments(self._padded(np.array(num_tokens)))
        return row

    # -- learning ---------------------------------------------------------------------------

    def observe(
        self, shape: StepShape, target_s: float | None, draft_s: float | None, step_s: float
    ) -> Residual:
        """Take in one step; the prediction returned was made before learning from it.

        ``target_s`` and ``draft_s`` are used when both are given; otherwise ``step_s``, the whole
        step, is. What the step took beyond the two is its overhead.
        """
        self._check(shape)
        non_negative("step_s", step_s)
        if step_s == 0.0:
            raise ValueError("step_s must be > 0")
        apart = target_s is not None and draft_s is not None
        if target_s is not None:
            non_negative("target_s", target_s)
        if draft_s is not None:
            non_negative("draft_s", draft_s)

        row = self._row(shape)
        if self._num_observed == 0:
            self._solver.rescale(max(step_s, RESOLUTION_S) / float(row @ self._solver.coef))
        solver = self._solver
        predicted = max(self._overhead.value + float(row @ solver.coef), RESOLUTION_S)
        step = self._filters["step"].judge(
            predicted, step_s, solver.leverage(row) / predicted**2
        )
        if apart:
            assert target_s is not None and draft_s is not None
            target, draft = row.copy(), row
            target[_DRAFTING:_SEGMENTS] = 0.0
            draft[:_DRAFTING] = draft[_SEGMENTS:] = 0.0
            clipped = self._learn("target", target, target_s)
            drafted = bool(draft.any())
            if drafted:
                clipped |= self._learn("draft", draft, draft_s)
            parts = target_s + draft_s if drafted else target_s
            self._overhead.add(max(step_s - parts, 0.0))
        else:
            clipped = step.clipped
            if step.shifted:
                solver.loosen(*_AFTER_SHIFT)
            value = max(step.value - self._overhead.value, 0.0)
            solver.add(row, value, _weight(predicted, step.value))
        solver.solve()

        band = int(np.searchsorted(self._low, shape.verify_tokens + shape.prefill_tokens)) - 1
        self._counts[band, int(shape.drafting)] += 1
        self._num_observed += 1
        error = min(abs(step_s - predicted) / step_s, 1.0)
        self._error += (error - self._error) / min(self._num_observed, 200)
        return Residual(predicted, step_s, clipped)

    def _learn(self, part: str, row: F64, seconds: float) -> bool:
        predicted = max(float(row @ self._solver.coef), RESOLUTION_S)
        leverage = self._solver.leverage(row) / predicted**2
        verdict = self._filters[part].judge(predicted, seconds, leverage)
        if verdict.shifted:
            self._solver.loosen(*_AFTER_SHIFT)
        self._solver.add(row, verdict.value, _weight(predicted, verdict.value))
        return verdict.clipped

    @staticmethod
    def _check(shape: StepShape) -> None:
        # NaN fails every comparison; one chain is far cheaper than a check per field.
        if not (0.0 <= min(shape) and max(shape) < math.inf and not any(v != v for v in shape)):
            raise ValueError(f"counts of a step must be finite and >= 0, got {shape}")
        if shape.verify_tokens + shape.prefill_tokens < 1.0:
            raise ValueError(f"a step has at least one token, got {shape}")

    def learn_one(self, x: dict[Any, Any], y: Any) -> None:
        """Take in a whole step's seconds; ``x`` by the names of `StepShape`, others ignored."""
        self.observe(self._shape(x), None, None, non_negative("y", y))

    def predict_one(self, x: dict[Any, Any]) -> float:
        """Expected seconds of a whole step."""
        return self.seconds(self._shape(x))

    def predict_std(self, x: dict[Any, Any]) -> float:
        """Standard deviation of the seconds of one step."""
        return self.std(self._shape(x))

    @staticmethod
    def _shape(x: dict[Any, Any]) -> StepShape:
        counts = {name: non_negative(name, x[name]) for name in StepShape._fields if name in x}
        counts.setdefault("batch", 0.0)
        if counts.get("verify_tokens", 0.0) + counts.get("prefill_tokens", 0.0) < 1.0:
            counts["verify_tokens"] = max(counts["batch"], 1.0)
        return StepShape(**counts)

    # -- what was learned -------------------------------------------------------------------

    def seconds(self, shape: StepShape) -> float:
        """Expected seconds of a step of ``shape``, overhead and drafting included; > 0."""
        self._check(shape)
        expected = self._overhead.value + float(self._row(shape) @ self._solver.coef)
        return max(expected, RESOLUTION_S)

    def std(self, shape: StepShape) -> float:
        """Standard deviation of the seconds of one step of ``shape``, in seconds."""
        self._check(shape)
        leverage = self._solver.leverage(self._row(shape))
        return self._filters["step"].noise * math.sqrt(self.seconds(shape) ** 2 + leverage)

    def target_curve(self, shape: StepShape, num_tokens: npt.ArrayLike) -> F64:
        """Seconds of steps without drafting, by N, the tokens of the target's pass.

        Parameters
        ----------
        shape : batch, context and prefill of the step; its verified tokens are not used
        num_tokens : [M], all tokens of the pass, ``shape.prefill_tokens`` among them

        Returns seconds [M] > 0, overhead included, never falling with N.
        """
        coef = self._solver.coef
        tokens = np.asarray(num_tokens, np.float64)
        fixed = (
            self._overhead.value
            + coef[_FIXED]
            + coef[_BATCH] * shape.batch / _TARGET_TERMS["batch"].scale
            + coef[_CONTEXT] * shape.context_tokens / _TARGET_TERMS["context"].scale
            + coef[_PREFILL] * shape.prefill_tokens / _TARGET_TERMS["prefill"].scale
        )
        curve = self._segments(self._padded(tokens)) @ coef[_SEGMENTS:]
        curve += fixed
        verified = np.maximum(tokens - shape.prefill_tokens, 0.0)
        curve += verified * (coef[_VERIFY] / _TARGET_TERMS["verify"].scale)
        if len(self._graphs):
            curve += coef[_EAGER] * (tokens > self._graphs[-1])
        return np.maximum(curve, RESOLUTION_S)

    def breakpoints(self, lo: int, hi: int) -> npt.NDArray[np.int64]:
        """Token counts in [lo, hi] between which `target_curve` is linear (at whole numbers).

        A jump after a graph size is given as two neighbouring counts. A curve that is asked for
        with prefill tokens has one more kink, at their number.
        """
        inner = np.array([*self.knots, *self.graph_sizes, *(g + 1 for g in self.graph_sizes)])
        inner = inner[(inner > lo) & (inner < hi)]
        return np.unique(np.array([lo, *inner, hi], np.int64))

    def draft_cost(self) -> tuple[float, float, float]:
        """Seconds of drafting at all, per sequential forward and per drafted token; >= 0."""
        coef = self._solver.coef
        return (
            float(coef[_DRAFTING]),
            float(coef[_FORWARDS]) / _DRAFT_TERMS["forwards"].scale if self.draft_forwards else 0.0,
            float(coef[_TOKENS]) / _DRAFT_TERMS["tokens"].scale,
        )

    def catch_up_cost(self) -> float:
        """Seconds per token that the drafter must catch up on; >= 0."""
        return float(self._solver.coef[_CATCH_UP]) / _DRAFT_TERMS["catch_up"].scale

    def coverage(self) -> Coverage:
        """Which passes were seen often enough, by size and by drafting or not: seeds a sweep."""
        counts = self._counts.copy()
        return Coverage((*self._low.tolist(), math.inf), counts, counts >= self.enough)

    def prediction_error(self) -> float:
        """Discounted mean of |observed - predicted| / observed, predicted before learning.

        A share of 1, over some 200 steps; one step counts at most 1.
        """
        return self._error

    @property
    def overhead_s(self) -> float:
        """Learned seconds of a step beyond target and draft; 0 where they are not seen apart."""
        return self._overhead.value

    @property
    def noise(self) -> float:
        """Learned standard deviation of a step's seconds, as a share of them."""
        return self._filters["step"].noise

    @property
    def num_observed(self) -> int:
        return self._num_observed

    @property
    def num_clipped(self) -> dict[str, int]:
        """Outliers drawn in, by what was timed: "target", "draft", "step"."""
        return {name: part.num_clipped for name, part in self._filters.items()}

    @property
    def num_shifts(self) -> dict[str, int]:
        """Changes of level recognised, by what was timed."""
        return {name: part.num_shifts for name, part in self._filters.items()}

    # -- state ------------------------------------------------------------------------------

    def state(self) -> State:
        return {
            "kind": type(self).__name__,
            "params": {
                "knots": list(self.knots),
                "graph_sizes": list(self.graph_sizes),
                "draft_forwards": self.draft_forwards,
                "forgetting": self.forgetting,
                "clip_at": self.clip_at,
                "prior_fixed_s": self.prior_fixed_s,
                "enough": self.enough,
            },
            "solver": self._solver.state(),
            "filters": {name: part.state() for name, part in self._filters.items()},
            "overhead": [self._overhead.value, self._overhead.deviation, self._overhead.count],
            "counts": self._counts.tolist(),
            "error": self._error,
            "num_observed": self._num_observed,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        try:
            if state["kind"] != cls.__name__:
                raise ValueError(f"state of a {state['kind']}, expected {cls.__name__}")
            params = dict(state["params"])
            for name in ("knots", "graph_sizes"):
                params[name] = tuple(params[name])
            model = cls(**params)
            model._solver.restore(state["solver"], len(model._solver.coef))
            for name, part in model._filters.items():
                part.restore(state["filters"][name])
            mean, deviation, count = state["overhead"]
            model._overhead.value = non_negative("overhead", mean)
            model._overhead.deviation = non_negative("deviation", deviation)
            model._overhead.count = int(non_negative("count", count))
            counts = np.array(state["counts"], np.int64)
            if counts.shape != model._counts.shape or counts.min() < 0:
                raise ValueError("counts do not match the knots")
            model._counts = counts
            model._error = non_negative("error", state["error"])
            model._num_observed = int(non_negative("num_observed", state["num_observed"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a state of {cls.__name__}: {error!r}") from None
        return model
