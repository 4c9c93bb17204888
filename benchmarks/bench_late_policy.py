"""Goodput that a policy loses when a fifth of its batch has been replaced, by cost curve."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import late_policy
from figures import record

SIZES = (1, 3), (3, 6), (6, 17), (17, 40)  #: of batches, each up to the second less one


def main() -> None:
    figures = {}
    for shape in late_policy.CURVES:
        for fewest, most in SIZES:
            lost = np.array(late_policy.losses(shape, fewest, most)) * 100
            name = f"{shape}_{fewest}_to_{most - 1}"
            figures[f"{name}_mean_loss_pct"] = float(lost.mean())
            figures[f"{name}_max_loss_pct"] = float(lost.max())
    record("late_policy", figures, seed=11)


if __name__ == "__main__":
    main()
