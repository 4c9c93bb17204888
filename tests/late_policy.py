"""What a policy is worth one step later, when a fifth of the batch (or one) has been replaced."""

from __future__ import annotations

import numpy as np

from smartspec.engine_adapter.lengths import RAGGED, CostCurve, DraftCost, Ladder
from smartspec.engine_adapter.optimum import solve, steered

NUM_TOKENS = np.arange(400.0)
CURVES = {
    "linear": 20 + 0.2 * NUM_TOKENS,
    "stepped": 20 + 0.2 * np.ceil(NUM_TOKENS / 8) * 8,
    "powers_of_two": 20 + 0.2 * 2 ** np.ceil(np.log2(np.maximum(NUM_TOKENS, 1))),
}


def losses(shape: str, fewest: int = 1, most: int = 40) -> list[float]:
    """Shares of goodput lost, per random batch: late value of time and depth against fresh ones.

    Of ``fewest`` requests up to ``most``, less one.
    """
    rng = np.random.default_rng(11)
    curve = CostCurve(RAGGED, NUM_TOKENS, CURVES[shape])
    draft = DraftCost(1.0, 0.5, 0.02)

    def survivals(count: int) -> np.ndarray:
        return np.cumprod(rng.beta(3, 2, count) * np.ones((6, 1)), axis=0)

    lost = []
    for _ in range(400):
        size = int(rng.integers(fewest, most))
        old = survivals(size)
        new = old.copy()
        replaced = rng.choice(size, max(1, size // 5), replace=False)
        new[:, replaced] = survivals(len(replaced))
        late = solve(Ladder(old), [curve], draft)
        best = solve(Ladder(new), [curve], draft)
        told = late.value_of_time, late.depth, [curve], draft, 0, len(new)
        chosen = steered(Ladder(new), *told)
        lost.append(1 - chosen.gain / chosen.seconds / best.value_of_time)
    return lost
