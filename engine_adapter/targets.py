"""Lengths for batches in which some requests have a target: so many seconds per token at most.

A request with target tau_i is in time, in expectation, when the step takes no longer than its
tokens are worth:

    T(k) <= tau_i E_i(k_i),        E_i(k) = 1 + sum_{j<=k} S_i(j)

Everyone's drafts make the step longer for all, so that a target binds the whole batch: the request
itself may need longer drafts, and the others shorter ones. For a given cap C on the step's time
both are what `choose_lengths` can do already: a floor of ``min {k : tau_i E_i(k) >= C}`` for each
such request, and no prefix whose time is beyond C. What is left is one number, C. A few between the
shortest step and the one that would be chosen without targets are tried; the best misses the fewest
targets and, among these, has the greatest ``gain - value_of_time * T``. A grid is not exact: the
best cap may lie between two of its values, which are some 5 to 10% apart.

"In expectation" is meant so: survivals are estimates, and who is just in time by them is late in a
good part of the steps.

Where the choice without targets meets them already, as on an idle engine, nothing more is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from smartspec.engine_adapter.lengths import (
    F64,
    Choice,
    CostCurve,
    DraftCost,
    Ladder,
    Worth,
    choose_lengths,
    step_seconds,
)

NUM_CAPS = 8
ROUNDING = 1e-6  #: a target missed by less is met


def expected_tokens(survival: Worth) -> F64:
    """E_i(k) for k = 0, 1, ...: [K + 1, B].

    >>> expected_tokens(np.array([[0.5], [0.25]])).tolist()
    [[1.0], [1.5], [1.75]]
    """
    tokens = np.ones((survival.shape[0] + 1, survival.shape[1]))
    tokens[1:] += survival.cumsum(0)
    return tokens


def out_of_reach(
    targets: npt.NDArray[Any],
    tokens: F64,
    curve: CostCurve,
    draft: DraftCost,
    num_other_tokens: int,
) -> npt.NDArray[np.bool_]:
    """Which targets cannot be met even if nobody else is drafted for: [B]; False without a target.

    ``targets`` [B] seconds per token, 0 for none; ``tokens`` [K + 1, B] of `expected_tokens`.
    """
    lengths = np.arange(len(tokens))
    seconds = np.array(
        [
            float(step_seconds(curve, draft, len(targets) + num_other_tokens + k, np.array(k), k))
            for k in lengths.tolist()
        ]
    )
    in_time = tokens * targets >= seconds[:, None] * (1 - ROUNDING)
    missed: npt.NDArray[np.bool_] = (targets > 0) & ~in_time.any(0)
    return missed


def choose_in_time(
    survival: Worth,
    weight: npt.NDArray[Any] | None,
    floor: npt.NDArray[Any] | None,
    ceiling: npt.NDArray[Any],
    targets: npt.NDArray[Any],
    value_of_time: float,
    depth: int,
    curves: Sequence[CostCurve],
    draft: DraftCost,
    num_other_tokens: int = 0,
) -> Choice:
    """The lengths of greatest ``gain - value_of_time * T`` among those that miss fewest targets.

    Parameters
    ----------
    survival, weight, floor, ceiling : as of `Ladder`
    targets : [B] seconds per token, 0 for none
    value_of_time, depth, curves, draft, num_other_tokens : as of `choose_lengths`

    >>> survival = np.array([[0.9, 0.9], [0.8, 0.8]])
    >>> curve = CostCurve("ragged", [2.0, 6.0], [1.0, 3.0])
    >>> given = survival, None, None, np.array([2, 2])
    >>> choose_in_time(*given, np.zeros(2), 1.0, 2, [curve], DraftCost()).lengths.tolist()
    [2, 2]
    >>> choose_in_time(*given, np.array([0.8, 0]), 1.0, 2, [curve], DraftCost()).lengths.tolist()
    [2, 0]
    """

    def choose(floor: npt.NDArray[Any] | None, latest_s: float) -> Choice:
        ladder = Ladder(survival, weight, floor, ceiling)
        return choose_lengths(
            ladder, value_of_time, depth, curves, draft, num_other_tokens, latest_s
        )

    def num_missed(choice: Choice) -> int:
        got = tokens[choice.lengths[wanting], np.arange(len(wanting))]
        return int((got * limits < choice.seconds * (1 - ROUNDING)).sum())

    best = choose(floor, np.inf)
    wanting = np.flatnonzero(targets > 0)
    tokens, limits = expected_tokens(survival[:, wanting]), targets[wanting]
    missed = num_missed(best)
    if not missed:
        return best
    low = np.zeros(len(targets), np.int64) if floor is None else floor.astype(np.int64)
    most = np.minimum(ceiling[wanting], len(survival))  # deeper than ``depth`` if need be
    shortest_s = choose(floor, 0.0).seconds  # nothing is in time: the least that can be done
    for cap_s in np.geomspace(min(shortest_s, best.seconds), best.seconds, NUM_CAPS):
        needed = (tokens * limits < cap_s * (1 - ROUNDING)).sum(0)
        # A request that cannot be in time within this cap makes the step no longer for it.
        raised = low.copy()
        raised[wanting] = np.maximum(low[wanting], np.where(needed <= most, needed, 0))
        choice = choose(raised, cap_s)
        late = num_missed(choice)
        value = choice.gain - value_of_time * choice.seconds
        if late < missed or (
            late == missed and value > best.gain - value_of_time * best.seconds + 1e-12
        ):
            best, missed = choice, late
    return best
