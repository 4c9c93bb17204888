"""Goodput of requests that are all alike: what an engine falls back to when the daemon is gone."""

from __future__ import annotations

import numpy as np

from smartspec.engine_adapter.lengths import F64, I64, CostCurve, DraftCost


def by_length(
    survival: F64, presence: float, batches: I64, curve: CostCurve, draft: DraftCost
) -> F64:
    """Goodput at each length for all, for requests that are all alike: [M, K + 1].

    Survivals of an average request [K], the probability that drafts exist, batch sizes [M].
    """
    lengths = np.arange(len(survival) + 1)
    tokens = 1.0 + presence * np.concatenate([[0.0], np.cumsum(survival)])
    drafts = batches[:, None] * lengths * presence
    num_tokens = batches[:, None] + drafts
    by_depth = np.array([draft.by_depth(length) for length in lengths.tolist()])
    speculating = by_depth + draft.per_token_s * drafts
    seconds = curve.at(num_tokens) + np.where(lengths > 0, speculating, 0.0)
    found: F64 = batches[:, None] * tokens / seconds
    return found


def best_by_batch(
    survival: F64, presence: float, batches: I64, curve: CostCurve, draft: DraftCost
) -> I64:
    """The best single length for each batch size, as `by_length` has it: [M].

    What an engine falls back to when the daemon is gone.

    >>> curve = CostCurve("ragged", [1.0, 8.0, 64.0], [1.0, 1.0, 8.0])
    >>> best_by_batch(np.array([0.8, 0.5]), 1.0, np.array([1, 4, 32]), curve, DraftCost()).tolist()
    [2, 1, 0]
    """
    best: I64 = np.argmax(by_length(survival, presence, batches, curve, draft), axis=1)
    return best
