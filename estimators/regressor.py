"""A river regressor for costs: seconds from whatever features come."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from river.base import Regressor

from smartspec.estimators.base import F64, State, non_negative
from smartspec.estimators.least_squares import (
    RESOLUTION_S,
    RecursiveLeastSquares,
    ResidualFilter,
    learn,
)


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
            # Other features may contribute 3 times the first observation (one deviation).
            level = max(seconds, RESOLUTION_S)
            self._prior_precision = (self._filter.noise / (3.0 * level)) ** 2
            prior = np.array([[self._prior_precision]])
            self._solver = RecursiveLeastSquares(np.array([level]), prior, self.forgetting)
        for _, name in new:
            self._slots[name] = len(self._scales)
            self._scales.append(float(x[name]))
            self._solver.grow(self._prior_precision)
        learn(self._solver, self._filter, self._row(x), seconds)
        self._solver.solve()

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
        """All that was learned and all arguments, as plain values."""
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
        """The model that gave ``state``; raise ValueError when it is not such a state."""
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
