"""How often guesses of a given confidence turn out to be right, and what the next may be worth."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from smartspec.engine_adapter.reference.sequence import SamplingParams

NUM_BINS = 16  #: of equal width in log-odds
LOG_ODDS = 6.0  #: from minus this to this
MEMORY = 2048.0  #: guesses of one bin beyond which older ones fade
STRENGTH = 16.0  #: guesses that the confidence itself is worth
SHARE_MEMORY = 2048.0  #: passes of the drafter that what it proposes is remembered from
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
    greedy and sampled requests, and between those who tell it.

    >>> calibration = Calibration()
    >>> calibration.rates([0.5]).tolist()
    [0.5]
    >>> calibration.learn([0.5] * 48, [True] * 48)
    >>> calibration.rates([0.5, 0.9]).round(3).tolist()
    [0.875, 0.9]
    """

    def __init__(self, num_bands: int = 1) -> None:
        self._counts = np.zeros((num_bands, NUM_BINS, 2))  # [right, tried]
        self._drafted = np.ones((num_bands, NUM_BINS))  # however they were chosen from
        self._num_passes = np.full((num_bands, 1), float(NUM_BINS))  # in which these were drafted

    def rates(self, confidences: npt.ArrayLike, bands: I64 | int = 0) -> F64:
        """P(right | its parent is), in the shape of ``confidences``, which are in [0, 1]."""
        given = np.asarray(confidences, np.float64)
        return self._rates(given, self._cells(given, bands))

    def _rates(self, given: F64, cells: I64) -> F64:
        right, tried = self._counts.reshape(-1, 2).T
        rates: F64 = (right[cells] + STRENGTH * given) / (tried[cells] + STRENGTH)
        return rates

    def learn(self, confidences: npt.ArrayLike, right: npt.ArrayLike, bands: I64 | int = 0) -> None:
        """Take in which drafts were right, of those whose parent was; all [M]."""
        cells = self._cells(np.asarray(confidences, np.float64), bands)
        size, shape = self._counts.size // 2, self._counts.shape[:2]
        self._counts[..., 0] += np.bincount(cells, right, size).reshape(shape)
        self._counts[..., 1] += np.bincount(cells, minlength=size).reshape(shape)
        self._counts *= np.minimum(1.0, MEMORY / np.maximum(self._counts[..., 1:], 1.0))

    def note(self, confidences: npt.ArrayLike, bands: I64) -> F64:
        """Take in how sure the drafter was of what may follow: of all, verified or not.

        ``confidences`` : [M, C], of its children of each node that it ran; ``bands`` : [M].
        Returns their `rates`.
        """
        given = np.asarray(confidences, np.float64)
        cells = self._cells(given, bands[:, None])
        drafted = np.bincount(cells.ravel(), minlength=self._drafted.size)
        self._drafted += drafted.reshape(self._drafted.shape)
        self._num_passes[:, 0] += np.bincount(bands, minlength=len(self._drafted))
        fading = np.minimum(1.0, SHARE_MEMORY / self._num_passes)
        self._drafted *= fading
        self._num_passes *= fading
        return self._rates(given, cells)

    def outlook(self, chances: npt.ArrayLike, price: F64, bands: I64) -> F64:
        """What a node's children may bring: E of the sum of max(chance rate - price, 0), [M].

        ``chances`` : [M], of the nodes, 1 for the root; ``price`` : [M], of a verification. The
        rates are those of children such as they come.
        """
        right, tried = np.moveaxis(self._counts, -1, 0)
        rates = (right + STRENGTH * _MIDDLE) / (tried + STRENGTH)
        shares = self._drafted / self._num_passes
        beyond = np.asarray(chances)[:, None] * rates[bands] - price[:, None]
        expected: F64 = (np.maximum(beyond, 0.0) * shares[bands]).sum(axis=1)
        return expected

    @staticmethod
    def _cells(confidences: F64, bands: I64 | int) -> I64:
        """Places in a table [bands, bins], flat."""
        bins: I64 = _EDGES.searchsorted(confidences, side="right")
        return bins + np.multiply(bands, NUM_BINS)


def _confidence(bins: npt.ArrayLike) -> F64:
    odds = np.exp((np.asarray(bins) * 2 / NUM_BINS - 1) * LOG_ODDS)
    confidence: F64 = odds / (1 + odds)
    return confidence


_EDGES = _confidence(np.arange(1.0, NUM_BINS))  #: between the bins
_MIDDLE = _confidence(np.arange(NUM_BINS) + 0.5)
