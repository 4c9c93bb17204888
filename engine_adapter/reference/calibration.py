"""How often guesses of a given confidence turn out to be right, and what the next may be worth."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from smartspec.engine_adapter.reference.sequence import SamplingParams

NUM_BINS = 16  #: of equal width in log-odds
LOG_ODDS = 6.0  #: from minus this to this
MEMORY = 256.0  #: guesses of one bin beyond which older ones fade
STRENGTH = 16.0  #: guesses that a confidence is worth beside a group's, and this beside a band's
SHARE_MEMORY = 256.0  #: runs of the drafter, of one band, that what it proposes is remembered from
TEMPERATURES = (0.0, 0.5, 1.0)  #: of requests: a band is what lies beyond one, up to the next
NUM_TEMPERATURES = len(TEMPERATURES) + 1
#: Of all tokens, what may be given up to see drafts that would not be run; and steps' worth of it
#: that are saved up.
CURIOSITY, SAVINGS_STEPS = 0.002, 200

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


class Curiosity:
    """Tokens that may be given up for news of drafts which are not expected to pay.

    What nobody runs, nobody learns about: it would stay as little worth as it once was.
    """

    def __init__(self) -> None:
        self._left = 0.0

    def earn(self, num_tokens: float) -> None:
        """Of a step that brings so many (weighted) tokens without drafts."""
        earned = CURIOSITY * num_tokens
        self._left = max(self._left, min(self._left + earned, SAVINGS_STEPS * earned))

    def pay(self, price: float) -> bool:
        """Pay, in tokens, if there is so much; whether there is."""
        affordable = price <= self._left
        if affordable:
            self._left -= max(0.0, price)
        return affordable


class Calibration:
    """Rates of success by confidence, learned from what became of drafts.

    A draft counts when its parent was accepted; of the others nothing is known. Until much is
    known a confidence stands for itself. By band, as what a confidence is worth differs between
    greedy and sampled requests, between those who tell it, and by what it follows on. Bands come
    in groups: one of which little is known is taken to be like the others of its group.

    Parameters
    ----------
    num_groups, num_bands : groups, and bands of each, which are numbered group by group

    >>> calibration = Calibration()
    >>> calibration.rates([0.5]).tolist()
    [0.5]
    >>> calibration.learn([0.5] * 48, [True] * 48)
    >>> calibration.rates([0.5, 0.9]).round(3).tolist()
    [0.875, 0.9]
    """

    def __init__(self, num_groups: int = 1, num_bands: int = 1) -> None:
        shape = num_groups, num_bands, NUM_BINS
        self._right, self._tried = np.zeros(shape), np.zeros(shape)
        self._drafted = np.ones(shape)  # however they were chosen from
        self._num_passes = np.full((*shape[:2], 1), float(NUM_BINS))  # in which these were drafted
        self._known, self._trust = self._line()
        self._shares = self._spread()
        self.curiosity = Curiosity()

    def rates(self, confidences: npt.ArrayLike, bands: I64 | int = 0) -> F64:
        """P(right | its parent is), in the shape of ``confidences``, which are in [0, 1]."""
        given = np.asarray(confidences, np.float64)
        return self._rates(given, _cells(given, bands))

    def _rates(self, given: F64, cells: I64) -> F64:
        rates: F64 = self._known.take(cells) + self._trust.take(cells) * given
        return rates

    def learn(self, confidences: npt.ArrayLike, right: npt.ArrayLike, bands: I64 | int = 0) -> None:
        """Take in which drafts were right, of those whose parent was; all [M]."""
        cells = _cells(np.asarray(confidences, np.float64), bands)
        size, shape = self._tried.size, self._tried.shape
        self._right += np.bincount(cells, right, size).reshape(shape)
        self._tried += np.bincount(cells, minlength=size).reshape(shape)
        fading = np.minimum(1.0, MEMORY / np.maximum(self._tried, 1.0))
        self._right *= fading
        self._tried *= fading
        self._known, self._trust = self._line()

    def _line(self) -> tuple[F64, F64]:
        """By cell, the rate at a confidence of 0, and what it gains up to 1: it is a line."""
        others_right = self._right.sum(axis=1, keepdims=True) - self._right
        others_tried = self._tried.sum(axis=1, keepdims=True) - self._tried
        among = STRENGTH / (others_tried + STRENGTH)
        tried = self._tried + STRENGTH
        return (self._right + among * others_right) / tried, STRENGTH * among / tried

    def note(self, confidences: npt.ArrayLike, bands: I64) -> F64:
        """Take in how sure the drafter was of what may follow: of all, verified or not.

        ``confidences`` : [M, C], of its children of each node that it ran; ``bands`` : [M].
        Returns their `rates`.
        """
        given = np.asarray(confidences, np.float64)
        cells = _cells(given, bands[:, None])
        shape = self._drafted.shape
        self._drafted += np.bincount(cells.ravel(), minlength=self._drafted.size).reshape(shape)
        passes = np.bincount(bands, minlength=self._num_passes.size)
        self._num_passes += passes.reshape(self._num_passes.shape)
        fading = np.minimum(1.0, SHARE_MEMORY / self._num_passes)
        self._drafted *= fading
        self._num_passes *= fading
        self._shares = self._spread()
        return self._rates(given, cells)

    def _spread(self) -> F64:
        """Children of each bin that a node has in the mean."""
        drafted, passes = self._drafted, self._num_passes
        of_group = drafted.sum(axis=1, keepdims=True) / passes.sum(axis=1, keepdims=True)
        shares: F64 = (drafted + STRENGTH * of_group) / (passes + STRENGTH)
        return shares

    def outlook(self, chances: npt.ArrayLike, price: F64, bands: I64) -> F64:
        """What a node's children may bring: E of the sum of max(chance rate - price, 0), [M].

        ``chances`` : [M], of the nodes, 1 for the root; ``price`` : [M], of a verification. The
        rates are those of children such as they come.
        """
        rates = (self._known + self._trust * _MIDDLE).reshape(-1, NUM_BINS)
        shares = self._shares.reshape(-1, NUM_BINS)
        beyond = np.asarray(chances)[:, None] * rates[bands] - price[:, None]
        expected: F64 = (np.maximum(beyond, 0.0) * shares[bands]).sum(axis=1)
        return expected


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
