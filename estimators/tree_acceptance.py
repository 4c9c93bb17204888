"""How likely the nodes of draft trees are to be accepted: gains per bucket and rank.

The nodes of a tree are ranked by how probable their drafter holds them to be. What a tree of k
nodes is expected to bring is the sum of the first k gains

    g[b, j] = P(the node of rank j is on the accepted path | bucket b)

Every node that is verified is seen to be accepted or not, so nothing is censored: the gain of a
rank is estimated from hits among tries, discounted, and shrunk as in acceptance.py, whose table,
additive model and memory these are. Two things differ. An untried rank is expected to bring
(j - 1) / j of the one before it: on recorded answers the gains of a draft model's trees fall about
as 1 / j. And gains are put in falling order, since ranks that are seen seldom may happen to have
hit more often than those before them. Sorted, an estimate of a falling sequence is never further
from it (Chernozhukov, Fernandez-Val and Galichon, Biometrika 96, 2009, 559), and its sum is kept.

Requests differ: request i accepts the node of rank j with probability g ** c_i. A path's
probability is a product over its nodes; a request that accepts each of them with some h ** c
accepts the path with the product to that power. c is learned as in acceptance.py, with every node
a draft of exposure -log g. They are not independent, though, and the unlikely ones tell little:
all nodes of a tree together count as one draft, which on recorded answers predicts better than if
each counted, and as well as anything in between.

Trees take fewer forwards of a draft model than they have nodes. One that doubles with every level
takes 1 + log2 k for k nodes, a chain takes k; what is reported is taken to be

    1 + a log2 k + b (k - 1 - log2 k)

with a, b >= 0 fitted, a = 1 and b = 0 where nothing was seen. Two numbers say something of sizes
never tried, too. (A truncated copy of the default model: 1, 2, 3, 3.8 and 4.8 forwards for 1, 2, 4,
8 and 16 nodes, a = 0.95 and b = 0. The surest request's tree decides for all, and may be all but a
chain.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from smartspec.estimators.acceptance import AcceptanceEstimator
from smartspec.estimators.base import F64, State, pack, unpack
from smartspec.estimators.frailty import time_of_event
from smartspec.estimators.survival_table import HAZARD_RANGE, Index, SurvivalTable, clipped

DEEPER = np.array((1.0, 0.0))  #: a and b where nothing was seen
DEEPER_WEIGHT = np.array((45.0, 80.0))  #: what that is worth, in squares: five trees of 8 nodes
FORWARDS_WINDOW = 500  #: trees that a and b are remembered from


def deeper(num_nodes: npt.ArrayLike) -> F64:
    """What a and b are multiplied by, [..., 2].

    >>> deeper([2, 8]).tolist()
    [[1.0, 0.0], [3.0, 4.0]]
    """
    nodes = np.asarray(num_nodes, np.float64)
    doublings = np.log2(nodes)
    return np.stack((doublings, nodes - 1.0 - doublings), axis=-1)


def tried(drafted: Index, max_length: int) -> npt.NDArray[np.bool_]:
    """[B, max_length], which ranks trees of ``drafted`` nodes have."""
    ranks: npt.NDArray[np.bool_] = np.arange(max_length) < drafted[:, None]
    return ranks


class GainTable(SurvivalTable):
    """Gains per bucket and rank; "hazard" and "survival" are both the gain of a rank."""

    group_starts: ClassVar[tuple[int, ...]] = (0, 1, 3, 7, 15, 31)

    def _pooled(self) -> F64:
        seen, hit = self._counts[:, -1].tolist()
        expected, pooled = self.prior, []
        for rank, (tries, hits) in enumerate(zip(seen, hit, strict=True), 1):
            rate = (hits + self.prior_weight * expected) / (tries + self.prior_weight)
            pooled.append(rate)
            expected = rate * rank / (rank + 1)
        return clipped(np.array(pooled), HAZARD_RANGE)

    def histogram(self, bucket: Index, proposed: Index, hits: npt.NDArray[Any]) -> F64:
        new = np.empty((2, self.num_buckets + 1, self.max_length))
        first = bucket * self.max_length
        for i, nodes in enumerate((tried(proposed, self.max_length), hits)):
            request, rank = nodes.nonzero()
            cells = np.bincount(first[request] + rank, minlength=new[i, :-1].size)
            new[i, :-1] = cells.reshape(self.num_buckets, self.max_length)
        new[:, -1] = new[:, :-1].sum(axis=1)
        return new

    def _cumulate(self, hazard: F64) -> F64:
        falling: F64 = -np.log(np.sort(hazard, axis=1)[:, ::-1])
        return falling


class TreeAcceptance(AcceptanceEstimator):
    """Gains per bucket and rank, corrections and match rates per request, depth of trees.

    The interface is `AcceptanceEstimator`'s, with ranks for depths: "survival" and "hazard" are the
    gain of a rank, and ``accepted`` says which ranks were accepted, [B, max_length] bools.

    Parameters
    ----------
    num_buckets, max_length, axis_sizes, max_requests : as of `AcceptanceEstimator`; lengths are
        numbers of nodes
    """

    _table_type: ClassVar[type[SurvivalTable]] = GainTable
    _tells_apart: ClassVar[bool] = False
    _params: ClassVar[tuple[str, ...]] = ("num_buckets", "max_length", "max_requests", "axis_sizes")

    def __init__(
        self,
        num_buckets: int = 1,
        max_length: int = 16,
        max_requests: int = 4096,
        axis_sizes: tuple[int, ...] = (),
    ) -> None:
        super().__init__(
            num_buckets,
            max_length,
            recent_strength=32.0,
            max_requests=max_requests,
            axis_sizes=axis_sizes,
        )
        self._nodes = np.arange(1, max_length + 1)
        self._deeper = deeper(self._nodes)
        self._forwards = np.zeros((3, 2))  # discounted sums: (forwards - 1) x, and x x^T
        self._fitted: tuple[float, ...] | None = None  # `forwards` of these; None: stale

    def _outcomes(self, *columns: npt.ArrayLike) -> list[npt.NDArray[Any]]:
        buckets, drafted, accepted = columns
        hits = np.asarray(accepted)
        if hits.dtype != np.bool_ or hits.ndim != 2 or hits.shape[1] != self.max_length:
            raise ValueError(f"accepted must be bools [B, {self.max_length}]")
        count: Index = np.count_nonzero(hits, axis=1)
        bucket, proposed, _ = super()._outcomes(buckets, drafted, count)
        if (hits & ~tried(proposed, self.max_length)).any():
            raise ValueError("nodes accepted that were not drafted")
        return [bucket, proposed, hits]

    def _first(self, hits: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        first: npt.NDArray[np.bool_] = hits[:, 0]
        return first

    def _events(
        self,
        c: F64,
        bucket: Index,
        proposed: Index,
        hits: npt.NDArray[Any],
    ) -> tuple[F64, F64]:
        self._table.refresh()
        most = int(proposed.max())
        exposure = self._table.cumulative[bucket, 1 : most + 1]
        hits, rejected = hits[:, :most], (tried(proposed, self.max_length) & ~hits)[:, :most]
        happened = rejected * time_of_event(c[:, None], exposure)
        seen = np.where(hits, exposure, happened).sum(axis=1)
        return rejected.sum(axis=1) / proposed, seen / proposed

    def _outcome(self, accepted: int) -> npt.NDArray[Any]:
        """The first ``accepted`` ranks: which they were a number does not say."""
        return tried(np.array([accepted], np.intp), self.max_length)

    def learn_forwards(self, num_nodes: int, num_forwards: int) -> None:
        """Take in that a draft model's trees of up to ``num_nodes`` took so many forwards."""
        if num_nodes > 1 and num_forwards > 0:
            row = deeper(num_nodes)
            further = min(num_forwards, num_nodes) - 1  # more were to catch up
            self._forwards *= 1.0 - 1.0 / FORWARDS_WINDOW
            self._forwards += np.vstack((further * row, np.outer(row, row)))
            self._fitted = None

    def forwards(self) -> tuple[float, ...]:
        if self._fitted is None:
            self._fitted = self._fit()
        return self._fitted

    def _fit(self) -> tuple[float, ...]:
        product = self._forwards[0] + DEEPER_WEIGHT * DEEPER
        square = self._forwards[1:] + np.diag(DEEPER_WEIGHT)
        fitted = np.linalg.solve(square, product)
        if fitted.min() < 0.0:  # neither may be: the other one by itself
            alone = product / square.diagonal()
            fitted = np.where(fitted > 0.0, alone, 0.0)
        return tuple(np.minimum(1.0 + self._deeper @ fitted, self._nodes).tolist())

    def merge(self, other: Self) -> None:
        super().merge(other)
        if other._forwards[1, 0] > self._forwards[1, 0]:
            self._forwards = other._forwards.copy()
            self._fitted = None

    def state(self, *, requests: bool = True) -> State:
        return super().state(requests=requests) | {"forwards": pack(self._forwards)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        model = super().from_state(state)
        forwards = unpack(state, "forwards", (3, 2))
        most = deeper(model.max_length)
        most = FORWARDS_WINDOW * np.vstack(((model.max_length - 1) * most, np.outer(most, most)))
        (aa, ab), (ba, bb) = forwards[1:].tolist()
        within = ((forwards >= 0.0) & (forwards <= most)).all()
        if not within or ab != ba or ab**2 > aa * bb * (1.0 + 1e-9):
            raise ValueError("forwards are not of trees")
        model._forwards = forwards
        return model
