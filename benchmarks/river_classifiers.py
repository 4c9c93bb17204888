"""River's classifiers as rivals in bench_acceptance.py: one draft at a time, accepted or not.

Each gets what our table is cut by (as logits), the depth, and the request's average so far (a Beta
posterior's mean): the same evidence, in the form that such models take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from acceptance_stream import Step
from acceptance_traces import MAX_LENGTH
from river import forest, linear_model, naive_bayes, optim, preprocessing, tree

F64 = npt.NDArray[np.float64]
FLOOR = 1e-2  #: keeps logits of features finite

MODELS: dict[str, list[Callable[[], Any]]] = {
    "logistic": [
        lambda rate=rate: (
            preprocessing.StandardScaler()
            | linear_model.LogisticRegression(optimizer=optim.SGD(rate), l2=1e-4)
        )
        for rate in (0.003, 0.01, 0.03)
    ],
    "naive_bayes": [naive_bayes.GaussianNB],
    "hoeffding_tree": [
        lambda period=period: tree.HoeffdingTreeClassifier(grace_period=period)
        for period in (50, 200)
    ],
    "adaptive_tree": [
        lambda period=period: tree.HoeffdingAdaptiveTreeClassifier(grace_period=period, seed=0)
        for period in (50, 200)
    ],
    "adaptive_forest": [lambda: forest.ARFClassifier(n_models=10, seed=0)],
}


def logit(p: F64) -> F64:
    clipped = np.clip(p, FLOOR, 1.0 - FLOOR)
    odds: F64 = np.log(clipped / (1.0 - clipped))
    return odds


class River:
    """A classifier behind the interface of bench_acceptance.py's methods.

    Predicts only the drafts that will be reached: no others are scored.

    Parameters
    ----------
    model : river classifier
    features : names of what it is given of a step
    strength : drafts that the average of all requests is worth in a request's
    """

    def __init__(self, model: Any, features: Sequence[str], strength: float = 8.0) -> None:
        self.model, self.features, self.strength = model, features, strength
        self._all = np.array((7.0, 10.0))  # accepted, reached
        self._counts: dict[int, F64] = {}
        self._events: list[tuple[dict[str, float], bool]] = []

    def predict(self, step: Step) -> F64:
        counts = np.array([self._counts.get(i, np.zeros(2)) for i in step.ids.tolist()])
        mean = self._all[0] / self._all[1]
        rate = (counts[:, 0] + self.strength * mean) / (counts[:, 1] + self.strength)
        columns = {name: logit(step.features[name]) for name in self.features} | {
            "request": logit(rate)
        }
        hazard = np.full((len(step.ids), MAX_LENGTH), mean)
        self._events = []
        reached = np.minimum(step.accepted + 1, step.drafted)
        for i, count in enumerate(reached.tolist()):
            for depth in range(count):
                x = {"depth": float(depth)}
                for name, column in columns.items():
                    # Linear models may weigh a feature differently at the first depth.
                    x[name] = float(column[i])
                    x[f"{name}_first"] = float(column[i]) if depth == 0 else 0.0
                chance = self.model.predict_proba_one(x)
                hazard[i, depth] = chance.get(True, mean if not chance else 0.0)
                self._events.append((x, depth < int(step.accepted[i])))
        return hazard

    def learn(self, step: Step) -> None:
        for x, accepted in self._events:
            self.model.learn_one(x, accepted)
        reached = np.minimum(step.accepted + 1, step.drafted)
        new = np.stack((step.accepted, reached), 1).astype(np.float64)
        for i, counts in zip(step.ids.tolist(), new, strict=True):
            self._counts[i] = self._counts.get(i, np.zeros(2)) + counts
        self._all += new.sum(axis=0)
