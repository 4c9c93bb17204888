"""The Python beside a step's drafts: growing a batch's trees of 16 nodes, with no model behind it.

Each request may have a copy of 8 tokens; what a drafter would say is made up, its confidences as
uneven as a head's (Dirichlet). *priced*: at prices at which about 8 nodes a request are verified;
*fixed*: 16 nodes each, whatever they are worth. A step is timed from the first question, whom to
run the drafter for, to the cut, with what is learned afterwards; without the drafter itself.

Run: python benchmarks/bench_growth.py [--steps 300]
"""

from __future__ import annotations

import argparse
import gc
import time

import numpy as np
from figures import percentiles_ms, record

from smartspec.engine_adapter.lengths import RAGGED, CostCurve, DraftCost
from smartspec.engine_adapter.prices import Prices
from smartspec.engine_adapter.reference.candidates import Candidates, Children, Level
from smartspec.engine_adapter.reference.draft_tree import agreeing_path
from smartspec.engine_adapter.reference.growth import Growth

NODES, CHILDREN, COPY = 16, 8, 8
SIZES = (1, 8, 64)
VOCABULARY = 50_000
PRICES = Prices(1.0, (CostCurve(RAGGED, [0.0, 1.0], [0.0, 0.03]),), DraftCost(0.0, 0.02))


class Steps:
    """Of one batch size."""

    def __init__(self, size: int, prices: Prices | None) -> None:
        self._size = size
        self._prices = prices
        self._rng = np.random.default_rng(0)
        self._calibration = Candidates.new_calibration()
        self._bands = np.zeros(size, np.int64)
        self.num_levels = self.num_verified = 0

    def run(self) -> float:
        """Seconds of one step."""
        rng, size = self._rng, self._size
        copied = [COPY * int(has) for has in rng.random(size) < 0.5]
        texts = [rng.integers(0, VOCABULARY, num).tolist() for num in copied]
        sure = [rng.beta(3, 2, num).tolist() for num in copied]
        spent = -time.perf_counter()
        growth = Growth(self._calibration, self._bands, np.full(size, NODES), self._prices)
        growth.candidates.copy(texts, sure)
        level = Level.of(growth.starting())
        spent += time.perf_counter()
        while level.size:
            said = self._said(level)
            spent -= time.perf_counter()
            growth.add(level, said)
            level = growth.next_level(np.full(size, 64))
            spent += time.perf_counter()
            self.num_levels += 1
        luck = rng.random(size)
        spent -= time.perf_counter()
        cut = growth.cut(luck)
        verified = cut.verified
        spent += time.perf_counter()
        drawn = [rng.choice([*tree.tokens, -1], tree.size + 1).tolist() for tree in verified]
        paths = [agreeing_path(tree, said) for tree, said in zip(verified, drawn, strict=True)]
        spent -= time.perf_counter()
        cut.accepted(drawn, paths)
        growth.candidates.learn([d[: len(p) + 1] for d, p in zip(drawn, paths, strict=True)])
        self.num_verified += int(cut.num_verified.sum())
        return spent + time.perf_counter()

    def _said(self, level: Level) -> Children:
        tokens = self._rng.integers(0, VOCABULARY, (level.size, CHILDREN))
        own = self._rng.dirichlet(np.full(CHILDREN + 1, 0.4), level.size)[:, :CHILDREN]
        return Children(tokens, own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    gc.collect()
    gc.freeze()
    for name, prices in (("priced", PRICES), ("fixed", None)):
        for size in SIZES:
            steps = Steps(size, prices)
            seconds = [steps.run() for _ in range(arguments.steps)]
            case = f"{name}_{size}"
            figures |= percentiles_ms(seconds[arguments.steps // 10 :], case)
            figures[f"{case}_passes"] = steps.num_levels / arguments.steps
            figures[f"{case}_nodes"] = steps.num_verified / arguments.steps / size
    record("growth", figures)


if __name__ == "__main__":
    main()
