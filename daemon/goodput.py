"""The objective and its optimum: the greatest goodput over depth and lengths. Pure.

    goodput(k) = sum_i w_i (1 + sum_{j<=k_i} S_i(j)) / T(N, D, sum k)

(SmartSpec, arXiv 2406.14066, section 4, with the closed form for a constant acceptance rate
replaced by survivals per depth.) For each depth D the best lengths with any given number of drafts
are a prefix of the sorted ladder (engine_adapter/lengths.py says why, and under which conditions),
so scanning all prefixes for all D, and every uniform length, visits an optimum. The value of time
is the goodput found: with it, `lengths.choose_lengths` makes the same choice from the same batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from smartspec.engine_adapter.lengths import (
    F64,
    I64,
    UNIFORM,
    Choice,
    CostCurve,
    DraftCost,
    Ladder,
    choose_lengths,
    step_seconds,
)


class Optimum(NamedTuple):
    value_of_time: float  #: the greatest goodput, weighted tokens per second
    depth: int  #: the depth it drafts to
    choice: Choice  #: its lengths


def solve(
    ladder: Ladder,
    curves: Sequence[CostCurve],
    draft: DraftCost,
    num_other_tokens: int = 0,
    other_value: float = 0.0,
) -> Optimum:
    """The optimum for a batch; ties go to the fewest drafts.

    Parameters
    ----------
    ladder : the batch's draftable items
    curves : seconds of the target's pass by tokens, for each execution mode that is a candidate
    num_other_tokens : tokens of the pass that are not verified (prefill)
    other_value : what each of these counts for in goodput, in tokens of an answer; above 0, a step
        that carries prompts is kept shorter, since drafts delay those too

    Raises ValueError when a candidate step would take no time.

    >>> ladder = Ladder(np.array([[0.9, 0.2], [0.8, 0.1]]))
    >>> curve = CostCurve("ragged", [1.0, 9.0], [1.0, 5.0])
    >>> optimum = solve(ladder, [curve], DraftCost())
    >>> optimum.choice.lengths.tolist(), round(optimum.value_of_time, 3)
    ([2, 0], 1.48)
    """
    # Without a price per forward a smaller depth only takes candidates away.
    deepest = ladder.max_length
    depths = range(deepest + 1) if draft.per_forward_s > 0 else (deepest,)
    best_goodput, best_depth = -np.inf, 0
    beside = other_value * num_other_tokens
    _, most_drafts = ladder.prefixes(deepest)
    for curve in curves:
        if curve.mode == UNIFORM:
            continue
        all_seconds = ladder.seconds_by_drafts(curve, draft, most_drafts, num_other_tokens)
        if not all_seconds.min() > 0:
            raise ValueError("a step must take time: cost curve <= 0")
        for depth in depths:
            gains, drafts = ladder.prefixes(depth)
            # Drafts are counted 0, 1, 2, ... at every depth: their cost was looked up once.
            seconds = all_seconds[: len(drafts)]
            if ladder.presence is not None and depth < deepest:
                seconds = ladder.seconds_by_drafts(curve, draft, drafts, num_other_tokens)
            times = ladder.add_depth(seconds, draft, depth, drafts)
            goodput = float(((gains + beside) / times).max())
            if goodput > best_goodput + 1e-12:
                best_goodput, best_depth = goodput, depth
    for curve in curves:
        if curve.mode != UNIFORM:
            continue
        for length in range(deepest + 1):
            lengths, gain = ladder.at(length)
            width = int(lengths.max(initial=0))
            drafted = np.array(float(lengths.sum()))
            num_tokens = ladder.size * (1 + width) + num_other_tokens
            seconds_all = float(step_seconds(curve, draft, num_tokens, drafted, width))
            goodput = (gain + beside) / seconds_all
            if goodput > best_goodput + 1e-12:
                best_goodput, best_depth = goodput, length
    choice = choose_lengths(ladder, best_goodput, best_depth, curves, draft, num_other_tokens)
    return Optimum(best_goodput, best_depth, choice)


def best_by_batch(
    survival: F64, presence: float, batches: I64, curve: CostCurve, draft: DraftCost
) -> I64:
    """The best single length for each batch size, for requests that are all alike.

    What an engine falls back to when the daemon is gone: survivals of an average request [K],
    the probability that drafts exist, batch sizes [M] -> lengths [M].

    >>> curve = CostCurve("ragged", [1.0, 8.0, 64.0], [1.0, 1.0, 8.0])
    >>> best_by_batch(np.array([0.8, 0.5]), 1.0, np.array([1, 4, 32]), curve, DraftCost()).tolist()
    [2, 1, 0]
    """
    lengths = np.arange(len(survival) + 1)
    tokens = 1.0 + presence * np.concatenate([[0.0], np.cumsum(survival)])
    drafts = batches[:, None] * lengths * presence
    num_tokens = batches[:, None] + drafts
    speculating = draft.fixed_s + draft.per_forward_s * lengths + draft.per_token_s * drafts
    seconds = curve.at(num_tokens) + np.where(lengths > 0, speculating, 0.0)
    best: I64 = np.argmax(batches[:, None] * tokens / seconds, axis=1)
    return best
