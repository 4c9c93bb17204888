"""How often drafts are right after a given token: what an engine knows, and a daemon does not.

Some tokens are easy to go on from (half a word, an opening bracket) and some are not (a comma).
The rate is kept per token, over all requests, shrunk to the rate of all tokens; it changes only
when there were drafts, so it goes stale but is never lost while nothing is drafted. Of a drafter
that cuts its drafts all of them count, those of which the target has told too; of trees, whether
one of the drafts after a token was right.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from smartspec.engine_adapter.base import F32

F64 = npt.NDArray[np.float64]

MEMORY = 512.0  #: drafts after one token beyond which older ones fade
LEAST = 1e-4  #: rate of all tokens, and of 1 less it: odds stay finite
STRENGTH = 2.0  #: drafts that the rate of all tokens is worth in that of one


class TokenAcceptance:
    """Rates of acceptance by the token before the draft; grows with the largest id seen.

    >>> rates = TokenAcceptance()
    >>> rates.learn([1, 1, 2], [True, True, False])
    >>> [round(rate, 2) for rate in rates.rates([1, 2]).tolist()]
    [0.8, 0.4]
    """

    def __init__(self) -> None:
        self._counts = np.zeros((0, 2))  # [accepted, reached] by token
        self._all = np.array((1.0, 2.0))
        self._lift = np.ones(0)  # odds after a token over those after any, as of when it was seen

    def learn(self, before: npt.ArrayLike, accepted: npt.ArrayLike) -> None:
        """Take in drafts that were reached: the token before each, and whether it was accepted."""
        tokens = np.asarray(before, np.intp)
        outcome = np.asarray(accepted, np.float64)
        if not len(tokens):
            return
        self._make_room(int(tokens.max()) + 1)
        np.add.at(self._counts, tokens, np.stack((outcome, np.ones(len(outcome))), axis=1))
        self._all += outcome.sum(), len(outcome)
        seen = np.unique(tokens)
        counts = self._counts[seen]
        counts *= np.minimum(1.0, MEMORY / counts[:, 1:])
        self._counts[seen] = counts
        self._all *= min(1.0, 16 * MEMORY / self._all[1])
        right, wrong = counts[:, 0], counts[:, 1] - counts[:, 0]
        pooled = self.pooled
        odds = (right + STRENGTH * pooled) / (wrong + STRENGTH * (1.0 - pooled))
        self._lift[seen] = odds / self.odds

    def rates(self, tokens: npt.ArrayLike) -> F32:
        """P(the draft after this token is accepted), [B] in (0, 1)."""
        return _rate(self.lift(tokens) * self.odds)

    def lift(self, tokens: npt.ArrayLike) -> F64:
        """Odds of acceptance after each of these tokens, [B], over those after any."""
        ids = np.asarray(tokens, np.intp)
        try:
            return self._lift.take(ids)
        except IndexError:
            self._make_room(int(ids.max()) + 1)
            return self._lift.take(ids)

    @property
    def odds(self) -> float:
        """Of acceptance, over all tokens."""
        pooled = self.pooled
        return pooled / (1.0 - pooled)

    @property
    def pooled(self) -> float:
        """P(a draft is accepted), over all tokens; never quite 0 or 1, whatever is learned."""
        return min(max(float(self._all[0] / self._all[1]), LEAST), 1.0 - LEAST)

    def _make_room(self, size: int) -> None:
        if size > len(self._counts):
            more = np.zeros((max(size, 2 * len(self._counts)) - len(self._counts), 2))
            self._counts = np.concatenate((self._counts, more))
            self._lift = np.concatenate((self._lift, np.ones(len(more))))


def _rate(odds: F64) -> F32:
    return (odds / (1.0 + odds)).astype(np.float32)


class CopyAcceptance:
    """Rates by the token before a draft and by the draft itself, where that is known beforehand.

    The two are joined as if independent given the outcome (naive Bayes): the odds of all drafts,
    times what the one token lifts them by, times what the other does.

    >>> rates = CopyAcceptance()
    >>> rates.learn([1, 1, 2], [5, 5, 6], [True, True, False])
    >>> [round(rate, 2) for rate in rates.rates([1, 1], [5, 6]).tolist()]
    [0.91, 0.64]
    """

    def __init__(self) -> None:
        self._before = TokenAcceptance()
        self._drafted = TokenAcceptance()

    def learn(self, before: npt.ArrayLike, drafted: npt.ArrayLike, accepted: npt.ArrayLike) -> None:
        """Take in drafts that were reached: the token before each, the draft, what became of it."""
        self._before.learn(before, accepted)
        self._drafted.learn(drafted, accepted)

    def rates(
        self,
        before: npt.ArrayLike,
        drafted: npt.ArrayLike,
        otherwise: npt.ArrayLike | None = None,
    ) -> F32:
        """P(the draft is accepted | the token before it, the draft), [B] in (0, 1).

        ``otherwise`` : [B] in (0, 1), a third such rate, joined as these are
        """
        odds = self._before.lift(before)
        odds *= self._drafted.lift(drafted)
        if otherwise is not None:
            third = np.asarray(otherwise, np.float64)
            odds *= third / (1.0 - third)
        else:
            odds *= self._before.odds
        return _rate(odds)
