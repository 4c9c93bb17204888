"""How often guesses of a given confidence turn out to be right, and what the next may be worth."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from smartspec.engine_adapter.reference.draft_tree import ROOT, DraftTree
from smartspec.engine_adapter.reference.sequence import SamplingParams

NUM_BINS = 16  #: of equal width in log-odds
LOG_ODDS = 6.0  #: from minus this to this
MEMORY = 2048.0  #: guesses of one bin beyond which older ones fade
STRENGTH = 16.0  #: guesses that the confidence itself is worth
SHARE_MEMORY = 2048.0  #: guesses that the shares of the bins are remembered from
TEMPERATURES = (0.0, 0.5, 1.0)  #: of requests: a band is what lies beyond one, up to the next
NUM_BANDS = len(TEMPERATURES) + 1

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


def temperature_bands(params: Iterable[SamplingParams]) -> I64:
    """The band of each request, [B]: 0 if it is greedy.

    >>> temperature_bands([SamplingParams(), SamplingParams(temperature=0.7)]).tolist()
    [0, 2]
    """
    wanted = [0.0 if one.greedy else one.temperature for one in params]
    bands: I64 = np.searchsorted(np.array(TEMPERATURES), wanted).astype(np.int64)
    return bands


class Calibration:
    """Rates of success by confidence, learned from what became of drafts.

    A draft counts when its parent was accepted; of the others nothing is known. Until much is
    known a confidence stands for itself. By band: what a confidence is worth differs between
    greedy and sampled requests.

    >>> calibration = Calibration()
    >>> calibration.rates([0.5]).tolist()
    [0.5]
    >>> for _ in range(48):
    ...     calibration.learn(DraftTree.chain([7]), [0.5], [0])
    >>> calibration.rates([0.5, 0.9]).round(3).tolist()
    [0.875, 0.9]
    """

    def __init__(self, num_bands: int = 1) -> None:
        self._counts = np.zeros((num_bands, NUM_BINS, 2))  # [right, tried]
        self._drafted = np.ones((num_bands, NUM_BINS))  # however they were chosen from

    def rates(self, confidences: npt.ArrayLike, bands: I64 | int = 0) -> F64:
        """P(right | its parent is), in the shape of ``confidences``, which are in [0, 1]."""
        given = np.asarray(confidences, np.float64)
        right, tried = np.moveaxis(self._counts[bands, self._bins(given)], -1, 0)
        rates: F64 = (right + STRENGTH * given) / (tried + STRENGTH)
        return rates

    def learn(
        self, tree: DraftTree, confidences: list[float], path: list[int], band: int = 0
    ) -> None:
        """Take in which nodes of a verified tree were right, by their own confidences [size]."""
        accepted = {ROOT, *path}
        tried = [node for node, parent in enumerate(tree.parents) if parent in accepted]
        if not tried:
            return
        counts = self._counts[band]
        bins = self._bins(np.array([confidences[node] for node in tried]))
        right = np.array([node in accepted for node in tried], np.float64)
        np.add.at(counts, bins, np.stack((right, np.ones(len(tried))), axis=1))
        counts *= np.minimum(1.0, MEMORY / np.maximum(counts[:, 1:], 1.0))

    def note(self, confidences: npt.ArrayLike, bands: I64) -> None:
        """Take in how sure the drafter is of its drafts: of all, verified or not."""
        np.add.at(self._drafted, (bands, self._bins(np.asarray(confidences, np.float64))), 1.0)
        total = self._drafted.sum(axis=1, keepdims=True)
        self._drafted *= np.minimum(1.0, SHARE_MEMORY / total)

    def outlook(self, chances: npt.ArrayLike, price: F64, bands: I64) -> F64:
        """What one more draft may bring beyond its price, [B]: E[max(chance rate - price, 0)].

        ``chances`` : [B], of the draft that it would follow, 1 at the start; ``price`` : [B], of
        a verification. The rate is that of a draft such as they come.
        """
        right, tried = np.moveaxis(self._counts, -1, 0)
        rates = (right + STRENGTH * _MIDDLE) / (tried + STRENGTH)
        shares = self._drafted / self._drafted.sum(axis=1, keepdims=True)
        beyond = np.asarray(chances)[:, None] * rates[bands] - price[:, None]
        expected: F64 = (np.maximum(beyond, 0.0) * shares[bands]).sum(axis=1)
        return expected

    @staticmethod
    def _bins(confidences: F64) -> npt.NDArray[np.intp]:
        inside = np.clip(confidences, 1e-6, 1 - 1e-6)
        place = (np.log(inside / (1 - inside)) + LOG_ODDS) * (NUM_BINS / (2 * LOG_ODDS))
        return np.clip(place, 0, NUM_BINS - 1).astype(np.intp)


_ODDS = np.exp(((np.arange(NUM_BINS) + 0.5) * 2 / NUM_BINS - 1) * LOG_ODDS)
_MIDDLE: F64 = _ODDS / (1 + _ODDS)  #: confidence in the middle of each bin
