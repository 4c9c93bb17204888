"""How often guesses of a given confidence turn out to be right."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from smartspec.engine_adapter.reference.draft_tree import ROOT, DraftTree

NUM_BINS = 16  #: of equal width in log-odds
LOG_ODDS = 6.0  #: from minus this to this
MEMORY = 2048.0  #: guesses of one bin beyond which older ones fade
STRENGTH = 16.0  #: guesses that the confidence itself is worth

F64 = npt.NDArray[np.float64]


class Calibration:
    """Rates of success by confidence, learned from what became of drafts.

    A draft counts when its parent was accepted; of the others nothing is known. Until much is
    known a confidence stands for itself.

    >>> calibration = Calibration()
    >>> calibration.rates([0.5]).tolist()
    [0.5]
    >>> for _ in range(48):
    ...     calibration.learn(DraftTree.chain([7]), [0.5], [0])
    >>> calibration.rates([0.5, 0.9]).round(3).tolist()
    [0.875, 0.9]
    """

    def __init__(self) -> None:
        self._counts = np.zeros((NUM_BINS, 2))  # [right, tried]

    def rates(self, confidences: npt.ArrayLike) -> F64:
        """P(right | its parent is), in the shape of ``confidences``, which are in [0, 1]."""
        given = np.asarray(confidences, np.float64)
        right, tried = np.moveaxis(self._counts[self._bins(given)], -1, 0)
        rates: F64 = (right + STRENGTH * given) / (tried + STRENGTH)
        return rates

    def learn(self, tree: DraftTree, confidences: list[float], path: list[int]) -> None:
        """Take in which nodes of a verified tree were right, by their own confidences [size]."""
        accepted = {ROOT, *path}
        tried = [node for node, parent in enumerate(tree.parents) if parent in accepted]
        if not tried:
            return
        bins = self._bins(np.array([confidences[node] for node in tried]))
        right = np.array([node in accepted for node in tried], np.float64)
        np.add.at(self._counts, bins, np.stack((right, np.ones(len(tried))), axis=1))
        self._counts *= np.minimum(1.0, MEMORY / np.maximum(self._counts[:, 1:], 1.0))

    @staticmethod
    def _bins(confidences: F64) -> npt.NDArray[np.intp]:
        inside = np.clip(confidences, 1e-6, 1 - 1e-6)
        place = (np.log(inside / (1 - inside)) + LOG_ODDS) * (NUM_BINS / (2 * LOG_ODDS))
        return np.clip(place, 0, NUM_BINS - 1).astype(np.intp)
