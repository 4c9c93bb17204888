"""Goodput of requests that are all alike: what an engine falls back to when the daemon is gone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from smartspec.engine_adapter.lengths import F64, I64, CostCurve, DraftCost


def by_length(
    survival: F64, presence: float, batches: I64, curves: Sequence[CostCurve], draft: DraftCost
) -> F64:
    """Goodput at each length for all, for requests that are all alike: [M, K + 1].

    Survivals of an average request [K], the probability that drafts exist, batch sizes [M] and the
    cost curve of each.
    """
    lengths = np.arange(len(survival) + 1)
    tokens = 1.0 + presence * np.concatenate([[0.0], np.cumsum(survival)])
    drafts = batches[:, None] * lengths * presence
    num_tokens = batches[:, None] + drafts
    by_depth = draft.by_depths(lengths)
    speculating = by_depth + draft.per_token_s * drafts
    passes = np.array([curve.at(row) for curve, row in zip(curves, num_tokens, strict=True)])
    seconds = passes + np.where(lengths > 0, speculating, 0.0)
    found: F64 = batches[:, None] * tokens / seconds
    return found


def best_by_batch(
    survival: F64, presence: float, batches: I64, curves: Sequence[CostCurve], draft: DraftCost
) -> I64:
    """The best single length for each batch size, as `by_length` has it: [M].

    What an engine falls back to when the daemon is gone.

    >>> curve = CostCurve("ragged", [1.0, 8.0, 64.0], [1.0, 1.0, 8.0])
    >>> survival, batches = np.array([0.8, 0.5]), np.array([1, 4, 32])
    >>> best_by_batch(survival, 1.0, batches, [curve] * 3, DraftCost()).tolist()
    [2, 1, 0]
    """
    best: I64 = np.argmax(by_length(survival, presence, batches, curves, draft), axis=1)
    return best
