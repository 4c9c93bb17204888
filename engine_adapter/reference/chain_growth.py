"""Chains of one step while they are drafted: their chances, who goes on, and what is verified."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from smartspec.engine_adapter.base import U8
from smartspec.engine_adapter.prices import Bools, Prices
from smartspec.engine_adapter.reference.calibration import F64, I64, Calibration


class Cut(NamedTuple):
    """What becomes of the drafts of a step; columns [B]."""

    num_verified: I64
    num_cut: U8  #: drafts behind these that are not verified
    num_cut_accepted: U8  #: of them, those that would be accepted: drawn by their chances


class ChainGrowth:
    """A batch's chains, from the first draft to the cut.

    A draft's chance of being accepted is the product of the rates, as calibrated, along its chain.

    Parameters
    ----------
    prices : of the step
    calibration : of the drafter's confidences, by temperature band
    bands : [B], of the requests
    ceiling : [B], most drafts
    """

    def __init__(
        self, prices: Prices, calibration: Calibration, bands: I64, ceiling: npt.NDArray[np.int64]
    ) -> None:
        self._prices = prices
        self._calibration = calibration
        self._bands = bands
        self._ceiling = ceiling
        self.drafted: I64 = np.zeros(len(bands), np.int64)
        self._chances: list[F64] = []  # [B] by depth; 0 where there is no draft

    def who_pays(self, able: Bools) -> Bools:
        """Who of ``able`` [B] should be drafted for once more, all in one forward."""
        size, prices = len(able), self._prices
        weight = np.ones(size) if prices.weight is None else prices.weight
        price = prices.of_token(size, int(self.drafted.sum())) / weight
        last = self._chances[-1] if self._chances else np.ones(size)
        able = able & (self.drafted < self._ceiling)
        gain = weight * self._calibration.outlook(np.where(able, last, 0.0), price, self._bands)
        paying = prices.pay(gain, starting=not self.drafted.any())
        if prices.floor is not None:
            paying |= able & (self.drafted < prices.floor)
        return paying

    def add(self, rows: npt.NDArray[np.intp], confidences: npt.ArrayLike) -> None:
        """One more draft for each of ``rows``, who have equally many; the drafter's confidences."""
        bands = self._bands[rows]
        self._calibration.note(confidences, bands)
        last = self._chances[-1] if self._chances else np.ones(len(self._bands))
        chances = np.zeros(len(self._bands))
        chances[rows] = last[rows] * np.minimum(self._calibration.rates(confidences, bands), 1.0)
        self._chances.append(chances)
        self.drafted[rows] += 1

    def next_step(self) -> Bools:
        """Who would pay for a first draft if the next step had this one's prices."""
        anew = ChainGrowth(self._prices, self._calibration, self._bands, self._ceiling)
        return anew.who_pays(self._ceiling > 0)

    def cut(self, luck: F64) -> Cut:
        """What is verified; ``luck`` [B], in [0, 1), decides what is told of the rest."""
        size = len(self._bands)
        chances = np.array(self._chances).reshape(-1, size)
        if not len(chances):
            nothing = np.zeros(size, np.uint8)
            return Cut(np.zeros(size, np.int64), nothing, nothing)
        verified = self._prices.verified(chances, self.drafted)
        # Given that all that is verified is accepted: of nothing else can one say what would be.
        at_end = np.vstack((np.ones(size), chances))[verified, np.arange(size)]
        depth = np.arange(1, len(chances) + 1)[:, None]
        behind = (depth > verified) & (depth <= self.drafted)
        passed = behind & (chances > luck * at_end)
        cut = (self.drafted - verified).astype(np.uint8)
        return Cut(verified, cut, passed.sum(axis=0).astype(np.uint8))
