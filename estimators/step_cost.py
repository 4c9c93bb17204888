"""What a step of a given shape costs on this machine, learned from served steps.

    seconds = overhead + target + draft
    target  = c_0 + c_batch B + sum_s c_s N_s + c_verify V + c_ctx C + c_prefill P + c_eager [N > G]
              + c_ragged [ragged]
    draft   = d_0 [drafting] + d_forward D + d_token n + d_catch_up m

B decoding requests; N = V + P tokens of the target's pass, V verified and P of prompts, rounded up
to a captured graph size where the engine pads; N_s the tokens of N that lie in segment s between
two knots; [ragged] whether an engine that has graphs for batches of one length ran one of several;
C context tokens; D sequential draft forwards of n tokens; m tokens that the drafter had
to catch up on. It is the linear model of SmartSpec (arXiv 2406.14066, T = c_ctx N_context + c_tok
N_batched + c_0) with what practice adds to it. A slope per segment, rather than hinges on one
slope, makes ">= 0 for every coefficient" the same as "the curve never falls with N", while concave
(mixture of experts) and convex (compute-bound) shapes both remain possible. Neighbouring slopes
are drawn together weakly, so that the curve goes on straight where nothing was seen. How it is
fitted: least_squares.py. On top of it the target's part has a factor for each of the smallest N,
which may fall where it was seen to: size_levels.py.

Engines that time target and draft apart
feed the two parts of the model; those that know only the sum feed all of it at once.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from river.base import Regressor

from smartspec.estimators.base import F64, LARGEST, State, non_negative
from smartspec.estimators.least_squares import (
    RESOLUTION_S,
    RecursiveLeastSquares,
    ResidualFilter,
    RobustMean,
    learn,
)
from smartspec.estimators.size_levels import SIZES, SizeLevels


class StepShape(NamedTuple):
    """What a step had to do, in counts (>= 0)."""

    batch: float  #: decoding requests
    verify_tokens: float  #: tokens verified for them: sum of k_i + 1, prompts not included
    prefill_tokens: float = 0.0  #: prompt tokens that shared the target's pass
    context_tokens: float = 0.0  #: KV entries read
    draft_forwards: float = 0.0  #: sequential draft passes, but for one that is run anyway
    draft_tokens: float = 0.0  #: tokens drafted in them
    catch_up_tokens: float = 0.0  #: tokens that the drafter processed to be in step again
    ragged: float = 0.0  #: 1: of several lengths, on an engine that runs a single one faster

    @property
    def drafting(self) -> bool:
        return self.draft_forwards > 0.0 or self.draft_tokens > 0.0


class Residual(NamedTuple):
    """What was expected of a step, and whether it fell out."""

    predicted_s: float
    clipped: bool  #: an outlier: learned from only up to the clipping limit


class Coverage(NamedTuple):
    """Steps seen, by tokens verified and by whether drafting took part."""

    edges: tuple[float, ...]  #: band i holds edges[i] < N <= edges[i + 1]; the last is open
    counts: npt.NDArray[np.int64]  #: [num_bands, 2]; column 1: with drafting
    enough: npt.NDArray[np.bool_]  #: [num_bands, 2]


class _Grid(NamedTuple):
    """Breakpoints of curves over one range of tokens, [M]."""

    tokens: F64
    sizes: F64  #: tokens that the target computes
    segments: F64  #: [M, num_segments], units in each segment


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
    "ragged": _Term(1.0, 0.0),
}
_DRAFT_TERMS = {
    "drafting": _Term(1.0, 0.05),
    "forwards": _Term(1.0, 0.1),
    "tokens": _Term(16.0, 0.02),
    "catch_up": _Term(64.0, 0.05),
}
_SEGMENT = _Term(16.0, 0.12)
_FIXED, _BATCH, _VERIFY, _CONTEXT, _PREFILL, _EAGER, _RAGGED = range(7)
_DRAFTING, _FORWARDS, _TOKENS, _CATCH_UP = range(7, 11)
_SEGMENTS = 11  # and onwards: one per segment
_SMALL = np.arange(1.0, SIZES + 2)  #: counts with a level of their own, and the next
SOLVED_EVERY = 8  #: steps, once not `YOUNG`: one alone moves coefficients that remember 50 little
YOUNG = 200  #: steps in which coefficients are still moving fast
MAX_GRIDS = 128  #: ranges of tokens whose breakpoints are kept
LEVELLED = 9  #: first steps, by the median of which the prior's level is set
OTHER_LEVEL = 3.0  #: times, by which that must be wrong
_NOISE = 0.1  # relative deviation of an observation that the prior's precision is in units of


def _prior(widths: F64, fixed_s: float) -> tuple[F64, F64]:
    """Prior mean and precision: a shape known within some factors, a level known hardly at all.

    ``widths``: [num_segments], tokens between two knots.
    """
    num_segments = len(widths)
    terms = [*_TARGET_TERMS.values(), *_DRAFT_TERMS.values(), *[_SEGMENT] * num_segments]
    share = np.array([term.prior for term in terms])
    mean = fixed_s * share
    spread = 3.0 * fixed_s * np.maximum(share, 0.05)
    # A narrow segment stands for a jump: all of it may add what a unit does elsewhere.
    steep = np.maximum(_SEGMENT.scale / widths, 1.0)
    spread[_SEGMENTS:] *= steep
    covariance = np.diag((spread / _NOISE) ** 2) + (30.0 / _NOISE) ** 2 * np.outer(mean, mean)
    precision = np.linalg.inv(covariance)
    # Slopes of neighbouring segments differ by about as much as a slope is large.
    differences = np.zeros((num_segments - 1, len(terms)))
    for i in range(num_segments - 1):
        stiffness = _NOISE / (fixed_s * _SEGMENT.prior * max(steep[i], steep[i + 1]))
        differences[i, _SEGMENTS + i : _SEGMENTS + i + 2] = (stiffness, -stiffness)
    precision += differences.T @ differences
    return mean, 0.5 * (precision + precision.T)


class StepCost(Regressor):
    """Step cost with the terms of this module's head: what the daemon asks for curves.

    Parameters
    ----------
    knots : token counts at which the slope in N may change
    graph_sizes : token counts of captured graphs; the engine pads a pass up to the next of them,
        and runs a larger pass without a graph. None: no padding
    draft_forwards : False for proposers whose depth costs no sequential passes (prompt lookup)
    forgetting, clip_at : see least_squares.py
    prior_fixed_s : the prior's cost of an empty step; with 1% of it per token (20 ms and 0.2 ms a
        token). The first few observations replace its level, and it weighs little in its shape
    enough : steps that make a cell of `coverage` seen
    """

    def __init__(
        self,
        knots: Sequence[int] = (16, 64, 256),
        graph_sizes: Sequence[int] | None = None,
        draft_forwards: bool = True,
        forgetting: float = 0.98,
        clip_at: float = 4.0,
        prior_fixed_s: float = 0.02,
        enough: int = 3,
    ) -> None:
        for name, counts in (("knots", knots), ("graph_sizes", graph_sizes or ())):
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
        self._graphs = np.array(graph_sizes or (), np.float64)
        self._full = (self._width[:-1] / _SEGMENT.scale).tolist()  # units of whole segments
        self._grids: dict[tuple[int, int, int], _Grid] = {}
        mean, precision = _prior(self._width, prior_fixed_s)
        if not draft_forwards:
            mean[_FORWARDS] = 0.0
        self._prior_mean = mean
        self._solver = RecursiveLeastSquares(mean, precision, forgetting)
        self._of_draft = np.zeros(len(mean))
        self._of_draft[_DRAFTING:_SEGMENTS] = 1.0
        self._of_target = 1.0 - self._of_draft
        self._filters = {
            name: ResidualFilter(clip_at, num_bands=len(self._low))
            for name in ("target", "draft", "step")
        }
        self._overhead = RobustMean()
        self._levels = SizeLevels()
        self._first: list[
            float
        ] = []  # seconds of the first steps over those that the prior expects
        self._level = 1.0  # times the prior as it was given
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

    def _size(self, num_tokens: float) -> float:
        """As `_padded`, of one count."""
        graphs = self.graph_sizes or ()
        if not graphs or num_tokens > graphs[-1]:
            return num_tokens
        return graphs[bisect_left(graphs, num_tokens)]

    def row(self, shape: StepShape) -> F64:
        """[num_terms]: the features of a step of ``shape``, in the units of the terms."""
        # Plain Python: for one shape it takes half the time of the vectorised features.
        batch, verify, prefill, context, forwards, tokens, catch_up, ragged = shape
        graphs = self.graph_sizes or ()
        eager = bool(graphs) and verify + prefill > graphs[-1]
        num_tokens = self._size(verify + prefill)
        row = [
            1.0,
            batch / _TARGET_TERMS["batch"].scale,
            verify / _TARGET_TERMS["verify"].scale,
            context / _TARGET_TERMS["context"].scale,
            prefill / _TARGET_TERMS["prefill"].scale,
            float(eager),
            ragged,
            float(shape.drafting),
            forwards / _DRAFT_TERMS["forwards"].scale if self.draft_forwards else 0.0,
            tokens / _DRAFT_TERMS["tokens"].scale,
            catch_up / _DRAFT_TERMS["catch_up"].scale,
        ]
        within = bisect_left(self.knots, num_tokens)
        below = self.knots[within - 1] if within else 0
        row += self._full[:within]
        row.append((num_tokens - below) / _SEGMENT.scale)
        row += [0.0] * (len(self.knots) - within)
        features = np.array(row)
        if num_tokens <= SIZES:
            level = self._levels.of(num_tokens)
            features[:_DRAFTING] *= level
            features[_SEGMENTS:] *= level
        return features

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
        if target_s is not None:
            non_negative("target_s", target_s)
        if draft_s is not None:
            non_negative("draft_s", draft_s)

        row = self.row(shape)
        solver = self._solver
        num_changes = solver.num_loosened
        if self._num_observed < LEVELLED:
            self._set_level(row, step_s)
        overhead_s = self._overhead.value
        predicted = max(overhead_s + float(row.dot(solver.coef)), RESOLUTION_S)
        of_target = row * self._of_target
        expected_s = float(of_target.dot(solver.coef))
        residuals = self._filters["step"]
        name = "step" if target_s is None or draft_s is None else "target"
        band = self._band(shape)
        if target_s is None or draft_s is None:
            verdict = learn(solver, residuals, row, step_s, overhead_s, band)
            seen_s = verdict.value - (predicted - expected_s)
            clipped = verdict.clipped
        else:
            residuals.judge(predicted, step_s, solver.leverage(row) / predicted**2, band)
            part_s = target_s
            verdict = learn(solver, self._filters["target"], of_target, target_s, 0.0, band)
            seen_s = verdict.value
            clipped = verdict.clipped
            if shape.drafting or shape.catch_up_tokens > 0.0:
                part_s += draft_s
                of_draft = row * self._of_draft
                draft = learn(solver, self._filters["draft"], of_draft, draft_s, 0.0, band)
                clipped = clipped or draft.clipped
            self._overhead.add(max(step_s - part_s, 0.0))
        # Precisions are in units of the noise: the quieter the machine, the sooner it, and not the
        # prior, is believed. More than at first the prior never counts: what looks like noise may
        # be that the prior is wrong, and would be for ever.
        self._solver.prior_weight = min(1.0, self._filters[name].noise / _NOISE) ** 2
        young = self._num_observed < YOUNG
        if young or num_changes < solver.num_loosened or self._num_observed % SOLVED_EVERY == 0:
            solver.solve()
        size = self._size(shape.verify_tokens + shape.prefill_tokens)
        if size <= SIZES and not verdict.shifted:
            ratio = self._levels.of(size) * seen_s / max(expected_s, RESOLUTION_S)
            self._levels.learn(int(size), ratio, verdict.trust)

        self._counts[band, int(shape.drafting)] += 1
        self._num_observed += 1
        error = min(abs(step_s - predicted) / step_s, 1.0)
        self._error += (error - self._error) / min(self._num_observed, 200)
        return Residual(predicted, clipped)

    def _set_level(self, row: F64, step_s: float) -> None:
        """Let the prior have the level of the first steps, whatever one of them took.

        The first of all may take seconds (kernels are compiled, caches are cold). By it alone terms
        that are never run would stay as uncertain as that, for the prior is not forgotten.
        """
        self._first.append(max(step_s, RESOLUTION_S) / float(row @ self._prior_mean))
        level = sorted(self._first)[(len(self._first) - 1) // 2]
        off = level / self._level
        if len(self._first) == 1 or not 1.0 / OTHER_LEVEL < off < OTHER_LEVEL:
            self._solver.restart(off)
            self._level = level

    def _band(self, shape: StepShape) -> int:
        """Between which knots the tokens of the target's pass lie."""
        return bisect_left(self.knots, shape.verify_tokens + shape.prefill_tokens)

    @staticmethod
    def _check(shape: StepShape) -> None:
        # By hand: a call per field would take longer than the features. NaN fails every comparison.
        for count in shape:
            if not 0.0 <= count <= LARGEST:
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
        expected = self._overhead.value + float(self.row(shape) @ self._solver.coef)
        return max(expected, RESOLUTION_S)

    def std(self, shape: StepShape) -> float:
        """Standard deviation of the seconds of one step of ``shape``, in seconds."""
        self._check(shape)
        residuals = self._filters["step"]
        own = (residuals.noise_in(self._band(shape)) * self.seconds(shape)) ** 2
        return math.sqrt(own + residuals.variance * self._solver.leverage(self.row(shape)))

    def log_ratio_std(self, a: StepShape, b: StepShape) -> float:
        """Deviation of log(expected seconds of ``a`` / those of ``b``), by what is unlearned.

        Errors that both shapes share cancel: that of a fixed cost hardly counts.
        """
        rows = [self.row(shape) / self.seconds(shape) for shape in (a, b)]
        return self._filters["step"].noise * math.sqrt(self._solver.leverage(rows[0] - rows[1]))

    def target_curve(self, shape: StepShape, num_tokens: npt.ArrayLike) -> F64:
        """Seconds of steps without drafting or prompts, by N, the tokens of the target's pass.

        With prompts in the pass, whose tokens count in N, `prefill_cost` has to be added.

        Parameters
        ----------
        shape : batch, context and mode of the step; no other count of it is used
        num_tokens : [M], tokens of the pass

        Returns seconds [M] > 0, overhead included. Falls with N only among the few smallest
        counts, and where it was seen to (size_levels.py).
        """
        tokens = np.asarray(num_tokens, np.float64)
        sizes = self._padded(tokens)
        return self._curve(shape, tokens, sizes, self._segments(sizes))

    def _curve(self, shape: StepShape, tokens: F64, sizes: F64, segments: F64) -> F64:
        coef = self._solver.coef
        fixed = (
            coef[_FIXED]
            + coef[_BATCH] * shape.batch / _TARGET_TERMS["batch"].scale
            + coef[_CONTEXT] * shape.context_tokens / _TARGET_TERMS["context"].scale
            + coef[_RAGGED] * shape.ragged
        )
        curve: F64 = segments @ coef[_SEGMENTS:]
        curve += fixed
        curve += tokens * (coef[_VERIFY] / _TARGET_TERMS["verify"].scale)
        if len(self._graphs):
            curve += coef[_EAGER] * (tokens > self._graphs[-1])
        curve *= self._levels.at(sizes)
        curve += self._overhead.value
        return np.maximum(curve, RESOLUTION_S)

    def breakpoints(self, lo: int, hi: int) -> npt.NDArray[np.int64]:
        """Token counts in [lo, hi] between which `target_curve` is linear (at whole numbers).

        A jump after a graph size is given as two neighbouring counts.
        """
        inner = np.concatenate((self._low, _SMALL, self._graphs, self._graphs + 1.0))
        inner = inner[(inner > lo) & (inner < hi)]
        return np.unique(np.concatenate(([lo], inner, [hi])).astype(np.int64))

    def whole_curve(self, shape: StepShape, lo: int, hi: int, far: int = 0) -> tuple[F64, F64]:
        """`target_curve` at its `breakpoints` in [lo, hi]: token counts, and seconds.

        Beyond that roughly: at counts that double, up to ``far``.
        What does not depend on what was learned is worked out once for a range.
        """
        grid = self._grids.get((lo, hi, far))
        if grid is None:
            if len(self._grids) >= MAX_GRIDS:
                self._grids.clear()
            beyond = [hi]
            while beyond[-1] < far:
                beyond.append(min(2 * beyond[-1], far))
            tokens = np.append(self.breakpoints(lo, hi), beyond[1:]).astype(np.float64)
            sizes = self._padded(tokens)
            grid = _Grid(tokens, sizes, self._segments(sizes))
            self._grids[lo, hi, far] = grid
        return grid.tokens, self._curve(shape, grid.tokens, grid.sizes, grid.segments)

    def prefill_cost(self) -> float:
        """Seconds by which a token of a prompt is dearer than a verified one; may be negative."""
        coef = self._solver.coef
        verify_s = float(coef[_VERIFY]) / _TARGET_TERMS["verify"].scale
        return float(coef[_PREFILL]) / _TARGET_TERMS["prefill"].scale - verify_s

    def draft_cost(self) -> tuple[float, float, float]:
        """Seconds of drafting at all, per sequential forward and per drafted token; >= 0."""
        coef = self._solver.coef
        return (
            float(coef[_DRAFTING]),
            float(coef[_FORWARDS]) / _DRAFT_TERMS["forwards"].scale if self.draft_forwards else 0.0,
            float(coef[_TOKENS]) / _DRAFT_TERMS["tokens"].scale,
        )

    def catch_up_cost(self) -> float:
        """Seconds of a token that the drafter reads to be in step again; >= 0."""
        return float(self._solver.coef[_CATCH_UP]) / _DRAFT_TERMS["catch_up"].scale

    def coverage(self) -> Coverage:
        """Which passes were seen often enough, by size and by drafting or not."""
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
        """Learned standard deviation of a step's seconds, as a share of them, on the whole."""
        return self._filters["step"].noise

    @property
    def num_observed(self) -> int:
        """Steps learned from."""
        return self._num_observed

    @property
    def num_clipped(self) -> dict[str, int]:
        """Outliers drawn in, by what was timed: "target", "draft", "step"."""
        return {name: part.num_clipped for name, part in self._filters.items()}

    @property
    def num_changes(self) -> int:
        """Times that a change of level made what was learned count for less."""
        return self._solver.num_loosened

    # -- state ------------------------------------------------------------------------------

    def merge(self, other: Self) -> None:
        """Take in what another model of equal arguments knows of the same kind of engine.

        By evidence, and adding none: see `RecursiveLeastSquares.join`. How noisy the machine is,
        and what has surprised it, stays as this model knows it. A copy of oneself changes nothing.
        """
        if self.state()["params"] != other.state()["params"]:
            raise ValueError("models of different arguments cannot be merged")
        self._solver.join(other._solver)
        self._levels.merge(other._levels)
        self._counts = np.maximum(self._counts, other._counts)
        self._num_observed = max(self._num_observed, other._num_observed)

    def state(self) -> State:
        """All that was learned and all arguments, as plain values."""
        return {
            "kind": type(self).__name__,
            "params": {
                "knots": list(self.knots),
                "graph_sizes": None if self.graph_sizes is None else list(self.graph_sizes),
                "draft_forwards": self.draft_forwards,
                "forgetting": self.forgetting,
                "clip_at": self.clip_at,
                "prior_fixed_s": self.prior_fixed_s,
                "enough": self.enough,
            },
            "solver": self._solver.state(),
            "filters": {name: part.state() for name, part in self._filters.items()},
            "overhead": self._overhead.state(),
            "levels": self._levels.state(),
            "first": list(self._first),
            "level": self._level,
            "counts": self._counts.tolist(),
            "error": self._error,
            "num_observed": self._num_observed,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The model that gave ``state``; raise ValueError when it is not such a state."""
        try:
            if state["kind"] != cls.__name__:
                raise ValueError(f"state of a {state['kind']}, expected {cls.__name__}")
            params = dict(state["params"])
            for name in ("knots", "graph_sizes"):
                if params[name] is not None:
                    params[name] = tuple(params[name])
            model = cls(**params)
            model._solver.restore(state["solver"], len(model._solver.coef))
            for name, part in model._filters.items():
                part.restore(state["filters"][name])
            model._overhead.restore(state["overhead"])
            model._levels.restore(state["levels"])
            first = [non_negative("first", value) for value in state["first"]]
            level = non_negative("level", state["level"])
            if len(first) > LEVELLED or not level > 0.0:
                raise ValueError("first steps are not those of a level")
            model._first, model._level = first, level
            counts = np.array(state["counts"], np.int64)
            if counts.shape != model._counts.shape or counts.min() < 0:
                raise ValueError("counts do not match the knots")
            model._counts = counts
            model._error = non_negative("error", state["error"])
            model._num_observed = int(non_negative("num_observed", state["num_observed"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a state of {cls.__name__}: {error!r}") from None
        return model
