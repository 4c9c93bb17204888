"""The objective and its optimum: the best lengths over depth, by goodput or at a price. Pure numpy.

    goodput(k) = sum_i w_i (1 + sum_{j<=k_i} S_i(j)) / T(N, D, sum k)

(SmartSpec, arXiv 2406.14066, section 4, with the closed form for a constant acceptance rate
replaced by survivals per depth.) For each depth D the best lengths with any given number of drafts
are a prefix of the sorted ladder (lengths.py says why, and under which conditions),
so scanning all prefixes for all D, and every uniform length, visits an optimum. Beyond
`EVERY_DEPTH`, where one forward more or less is little of what they cost together (trees of up to
64 nodes), every D a quarter above the last is: the forwards paid for may be so many too many.

The *value of time*, lambda, is what the lengths of a step are chosen by: the best have the greatest
gain - lambda T. Where a step stands for all that follow, lambda is the greatest goodput itself
(Dinkelbach 1967): `solve`. A step that carries prompts does not: its goodput is poor whatever its
lengths are, and at that price of a second drafts look cheap that keep prompts waiting. What a
second is really worth is what it brings in the steps that are free of prompts: `at_price`, with the
goodput of the same batch alone (docs/adr/0005-price-of-time.md).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from smartspec.engine_adapter.lengths import (
    UNIFORM,
    Choice,
    CostCurve,
    DraftCost,
    Ladder,
    batch_seconds,
    choose_lengths,
    possible,
)

EVERY_DEPTH = 16  #: up to which the optimum over depth is exact
#: Items, each as often as it is sorted, up to which all depths are looked at in one go.
AT_ONCE = 2500
NIMBLE = 16  #: requests, up to which a batch is drafted for to a depth of its own


class Optimum(NamedTuple):
    goodput: float  #: expected of the step, in weighted tokens per second
    value_of_time: float  #: the price of a second that it was chosen at, in the same unit
    depth: int  #: the depth it drafts to
    choice: Choice  #: its lengths


def solve(
    ladder: Ladder, curves: Sequence[CostCurve], draft: DraftCost, num_other_tokens: int = 0
) -> Optimum:
    """The lengths of greatest goodput for a batch; ties go to the fewest drafts.

    Parameters
    ----------
    ladder : the batch's draftable items
    curves : seconds of the target's pass by tokens, for each execution mode that is a candidate
    num_other_tokens : tokens of the pass that are not verified (prefill)

    Raises ValueError where a step would take no time by a curve.

    >>> ladder = Ladder(np.array([[0.9, 0.2], [0.8, 0.1]]))
    >>> curve = CostCurve("ragged", [1.0, 9.0], [1.0, 5.0])
    >>> optimum = solve(ladder, [curve], DraftCost())
    >>> optimum.choice.lengths.tolist(), round(optimum.goodput, 3)
    ([2, 0], 1.48)
    """
    if not all(curve.least_s > 0 for curve in curves):
        raise ValueError("a step must take time: cost curve <= 0")
    given = curves, draft, num_other_tokens
    goodput, depth = _best(ladder, ladder.max_length, *given, operator.truediv)
    return Optimum(goodput, goodput, depth, choose_lengths(ladder, goodput, depth, *given))


def at_price(
    ladder: Ladder,
    value_of_time: float,
    curves: Sequence[CostCurve],
    draft: DraftCost,
    num_other_tokens: int = 0,
    deepest: int | None = None,
) -> Optimum:
    """The lengths of greatest gain - ``value_of_time`` * T; ties go to the fewest drafts.

    Parameters as of `solve`, and ``deepest``: the longest length to consider; None: all.

    >>> ladder = Ladder(np.array([[0.9, 0.2], [0.8, 0.1]]))
    >>> curve = CostCurve("ragged", [1.0, 9.0], [1.0, 5.0])
    >>> at_price(ladder, 1.7, [curve], DraftCost(), 4).choice.lengths.tolist()
    [1, 0]
    """
    given = curves, draft, num_other_tokens
    deepest = ladder.max_length if deepest is None else min(deepest, ladder.max_length)
    depth = deepest
    if draft.per_forward_s > 0:  # else all depths cost the same
        _, depth = _best(
            ladder, deepest, *given, lambda gain, seconds: gain - value_of_time * seconds
        )
    choice = choose_lengths(ladder, value_of_time, depth, *given)
    return Optimum(choice.gain / choice.seconds, value_of_time, depth, choice)


def is_nimble(size: int, draft: DraftCost, deepest: int) -> bool:
    """Whether an engine finds the depth for so many requests itself, where it may to ``deepest``.

    What is best for a few requests is another depth as soon as one of them has changed.
    """
    return 0 < deepest and size <= NIMBLE and draft.per_forward_s > 0.0


def steered(
    ladder: Ladder,
    value_of_time: float,
    depth: int,
    curves: Sequence[CostCurve],
    draft: DraftCost,
    num_other_tokens: int,
    deepest: int,
) -> Choice:
    """The lengths that an engine takes under a policy, of greatest gain - ``value_of_time`` * T.

    To the policy's ``depth``, which is the best of the batch that the daemon knew. What is best for
    a small one is soon another: with ``deepest`` > 0 the best depth up to that is found anew where
    there are no more than `NIMBLE` requests.
    """
    given = curves, draft, num_other_tokens
    if is_nimble(ladder.size, draft, deepest):
        return at_price(ladder, value_of_time, *given, deepest).choice
    return choose_lengths(ladder, value_of_time, depth, *given)


def depths_tried(deepest: int) -> list[int]:
    """All up to `EVERY_DEPTH`, and beyond that each a quarter more than the one before.

    >>> depths_tried(64)[-8:]
    [16, 20, 25, 31, 38, 47, 58, 64]
    """
    depths = list(range(min(deepest, EVERY_DEPTH) + 1))
    while depths[-1] < deepest:
        depths.append(min(depths[-1] * 5 // 4, deepest))
    return depths


def _best(
    ladder: Ladder,
    deepest: int,
    curves: Sequence[CostCurve],
    draft: DraftCost,
    num_other_tokens: int,
    worth: Callable[[Any, Any], Any],
) -> tuple[float, int]:
    """The greatest ``worth(gain, seconds)`` that any lengths have, and the depth of those."""
    best, best_depth = -np.inf, 0
    curves = possible(curves, num_other_tokens)
    for curve in curves:
        if curve.mode == UNIFORM:
            continue
        given = ladder, deepest, curve, draft, num_other_tokens, worth
        for depth, found in _by_depth(*given):
            if found > best + 1e-12:
                best, best_depth = found, depth
    for curve in curves:
        if curve.mode != UNIFORM:
            continue
        for length in range(deepest + 1):
            lengths, gain = ladder.at(length)
            drafts = float(lengths.sum())
            seconds = batch_seconds(curve, draft, lengths, num_other_tokens, drafts)
            found = float(worth(gain, seconds))
            if found > best + 1e-12:
                best, best_depth = found, length
    return best, best_depth


def _by_depth(
    ladder: Ladder,
    deepest: int,
    curve: CostCurve,
    draft: DraftCost,
    num_other_tokens: int,
    worth: Callable[[Any, Any], Any],
) -> list[tuple[int, float]]:
    """The greatest worth of ragged lengths within each depth that is worth a look."""
    num_items = deepest * ladder.size
    at_once = deepest <= EVERY_DEPTH and (deepest + 1) * num_items <= AT_ONCE
    if at_once and draft.per_forward_s > 0 and ladder.presence is None:
        drafts = ladder.drafts(num_items)
        by_drafts = ladder.seconds_by_drafts(curve, draft, drafts, num_other_tokens)
        seconds = ladder.add_depths(by_drafts, draft, deepest, drafts)
        return list(enumerate(worth(ladder.gains_by_depth(deepest), seconds).max(axis=1).tolist()))
    # Without a price per forward a smaller depth only takes candidates away.
    depths = depths_tried(deepest) if draft.per_forward_s > 0 else [deepest]
    most, drafts = ladder.prefixes(deepest)
    by_drafts = ladder.seconds_by_drafts(curve, draft, drafts, num_other_tokens)
    best = -np.inf
    found: list[tuple[int, float]] = []
    for depth in depths:
        gain, seconds = most, ladder.add_depth(by_drafts, draft, depth, drafts)
        if depth < deepest and ladder.presence is None:
            if found and float(worth(most, seconds).max()) <= best:
                break  # nor any deeper: it would bring no more than this, and cost no less
            gain = ladder.prefixes(depth)[0]
            seconds = seconds[: len(gain)]
        elif depth < deepest:
            gain, fewer = ladder.prefixes(depth)
            fewer_s = ladder.seconds_by_drafts(curve, draft, fewer, num_other_tokens)
            seconds = ladder.add_depth(fewer_s, draft, depth, fewer)
        found.append((depth, float(worth(gain, seconds).max())))
        best = max(best, found[-1][1])
    return found
