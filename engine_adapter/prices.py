"""What drafts must bring at step time, where their own confidences say how good they are.

Lengths that are chosen before anything is drafted know only what drafts like these came to before.
A drafter that tells how sure it is of each lets two decisions wait until then, at the policy's
value of time (lambda):

* *run the drafter once more* while what that may bring beyond its verification pays for the
  forward, which all who go on share. What lies beyond it need not be looked at: chances fall along
  a path, so that a forward which does not pay is followed by none that does;
* *verify* what is worth a verification. What was drafted has been paid for.

The second is `lengths.choose_lengths` with chances for survivals and drafting for nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from smartspec.engine_adapter.lengths import (
    F64,
    I64,
    CostCurve,
    DraftCost,
    Ladder,
    choose_lengths,
)

Bools = npt.NDArray[np.bool_]


class Prices(NamedTuple):
    """Of one step; columns [B] as in its batch.

    >>> prices = Prices(1.0, (CostCurve("ragged", [0.0, 9.0], [1.0, 5.5]),), DraftCost(0, 0.3))
    >>> prices.of_token(2, 0)
    0.5
    >>> prices.pay(np.array([0.2, 0.15, 0.0]), starting=True).tolist()
    [True, True, False]
    >>> prices.verified(np.array([[0.9, 0.6], [0.7, 0.2]]), np.array([2, 2])).tolist()
    [2, 1]
    """

    value_of_time: float  #: tokens per second
    curves: tuple[CostCurve, ...]  #: seconds of the target's pass
    draft: DraftCost
    weight: npt.NDArray[Any] | None = None  #: of a token
    floor: npt.NDArray[Any] | None = None  #: drafts that are verified in any case
    num_other_tokens: int = 0  #: tokens of the pass that are not verified

    def floors(self, size: int) -> I64:
        """Drafts that are verified in any case, [size]."""
        return np.zeros(size, np.int64) if self.floor is None else self.floor.astype(np.int64)

    def of_token(self, size: int, num_drafts: int) -> float:
        """Tokens that verifying one more draft must bring: the mean of the ``size`` next.

        ``size`` : requests in the batch, ``num_drafts`` of which are in the pass already
        """
        begin = size + self.num_other_tokens + num_drafts
        before_s, after_s = self.curves[0].at((begin, begin + size)).tolist()
        return float(max(0.0, self.value_of_time * (after_s - before_s) / size))

    def pay(self, gain: F64, starting: bool) -> Bools:
        """What the drafter is run on, [M]: what is worth it, if all together pays the forward.

        ``gain`` : [M], what follows each may bring beyond its verification, weighted; 0: nothing
        """
        return self._alike(gain, starting)[0]

    def _alike(self, gain: F64, starting: bool) -> tuple[Bools, F64, float]:
        """Who pays, what each brings beyond its draft, and the seconds of the forward."""
        beyond = gain - self.value_of_time * self.draft.per_token_s
        forward_s = self.draft.per_forward_s + (self.draft.fixed_s if starting else 0.0)
        able: Bools = (gain > 0) & (beyond > 0)
        if float(beyond[able].sum()) <= self.value_of_time * forward_s:
            able = np.zeros(len(gain), np.bool_)
        return able, beyond, forward_s

    def join(self, gain: F64, starting: bool, lag: F64, waited: F64) -> tuple[Bools, F64]:
        """As `pay`, where the drafter has first to read what it has missed; and what is waited now.

        How long a request will go on nobody knows. So the drafter catches up with it once what it
        would have brought meanwhile comes to what that costs: as who rents skis until they have
        cost as much as a pair, which is twice the best in hindsight at most. What comes while a
        request waits is part of its lag: a drafter that had begun would have read it as it came.

        Parameters
        ----------
        gain, starting : as of `pay`
        lag : [M], tokens that the drafter has missed
        waited : [M], weighted tokens that it would have brought since, beyond what it costs

        >>> prices = Prices(1.0, (CostCurve("ragged", [0.0, 9.0], [1.0, 5.5]),), DraftCost(0, 0.3))
        >>> prices = prices._replace(draft=prices.draft._replace(per_catch_up_s=0.01))
        >>> joins, waited = prices.join(np.array([0.4, 0.8]), True, np.array([1, 90]), np.zeros(2))
        >>> joins.tolist(), waited.round(2).tolist()
        ([True, False], [0.0, 0.6])
        """
        able, beyond, forward_s = self._alike(gain, starting)
        price = self.value_of_time * self.draft.per_catch_up_s * lag
        total = float(beyond[able].sum())
        if not total:
            return able, waited
        waited = waited + np.where(able, beyond * (1.0 - self.value_of_time * forward_s / total), 0)
        joins: Bools = able & (waited >= price)
        if float(beyond[joins].sum()) <= self.value_of_time * forward_s:
            joins = np.zeros(len(gain), np.bool_)
        return joins, np.where(joins, 0.0, waited)

    def short(self, gain: F64, lag: F64) -> tuple[Bools, float]:
        """Whom to run the drafter for to see how drafts are, [M], and what that lacks, in tokens.

        Those who bring something beyond their own cost, or else the one that loses least.

        ``gain``, ``lag`` : as of `join`, of one request or more; what the drafter has missed of
        these is paid for now

        >>> prices = Prices(1.0, (CostCurve("ragged", [0.0, 9.0], [1.0, 5.5]),), DraftCost(0, 0.3))
        >>> able, lacking = prices.short(np.array([0.2, 0.0]), np.zeros(2))
        >>> able.tolist(), round(lacking, 2)
        ([True, False], 0.1)
        """
        draft, value = self.draft, self.value_of_time
        beyond = gain - value * (draft.per_token_s + draft.per_catch_up_s * lag)
        able: Bools = beyond > 0
        if not able.any():
            able = np.arange(len(gain)) == beyond.argmax()
        forward_s = draft.per_forward_s + draft.fixed_s
        return able, value * forward_s - float(beyond[able].sum())

    def verified(self, chances: F64, drafted: I64) -> I64:
        """How many of its drafts are worth their verification, [B].

        ``chances`` : [K, B], that a draft is accepted, falling; ``drafted`` : [B], how many
        there are
        """
        ladder = Ladder(chances, self.weight, self.floor, drafted)
        given = list(self.curves), DraftCost(), self.num_other_tokens
        return choose_lengths(ladder, self.value_of_time, len(chances), *given).lengths
