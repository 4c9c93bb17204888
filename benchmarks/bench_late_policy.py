"""Goodput that a policy loses when a fifth of its batch has been replaced, by cost curve."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import late_policy
from figures import record


def main() -> None:
    figures = {}
    for shape in late_policy.CURVES:
        lost = np.array(late_policy.losses(shape)) * 100
        figures[f"{shape}_mean_loss_pct"] = float(lost.mean())
        figures[f"{shape}_max_loss_pct"] = float(lost.max())
    record("late_policy", figures, seed=11)


if __name__ == "__main__":
    main()
