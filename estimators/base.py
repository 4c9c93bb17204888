"""The contract of every estimator: learn one observation, predict one, say how sure, be saved.

`learn_one` and `predict_one` are river's. Added are the spread of the predicted outcome and a
state of plain Python values and bytes, which any serialiser carries. The rules that the
conformance suite (tests/conformance/test_estimators.py) holds every estimator to:

* predicting changes nothing, and works before anything was learned;
* input that is NaN, infinite or negative raises `ValueError` before any state has changed;
* features may appear and vanish: an absent one counts as 0 or as unknown, never as an error;
* memory and time per observation are bounded, and repeating one observation for ever (an idle
  engine) does no harm to what was learned elsewhere;
* a pickled copy behaves as ``e`` does, bit for bit; so does `from_state(e.state())`, except that
  what ``e`` works out only every few steps (survival_table.py, once settled) it works out anew;
* constructors store their arguments unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

#: Plain Python values (None, bool, int, float, str, bytes, lists and dicts of these).
State = dict[str, Any]


class OnlineEstimator(Protocol):
    """What learns from a stream, one observation at a time. Not thread-safe; does no I/O."""

    def learn_one(self, x: dict[Any, Any], y: Any) -> None:
        """Take in the outcome ``y`` of features ``x``; raise ValueError on impossible input."""

    def predict_one(self, x: dict[Any, Any]) -> Any:
        """The expected outcome of features ``x``."""

    def predict_std(self, x: dict[Any, Any]) -> float:
        """Standard deviation of the outcome around `predict_one`, what is unlearned included."""

    def state(self) -> State:
        """All that was learned and all constructor arguments, as plain values."""

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The estimator that gave ``state``; raise ValueError when it is not such a state."""


#: Counts and seconds beyond this are taken for an error of the sender.
LARGEST = 1e12


RIVALS = 4.0  #: times the evidence, up to which two views of one thing are both heard


def shares_of_rivals(mine: F64, other: F64) -> tuple[F64, F64]:
    """What two views of the same things count in one, by their evidence; none is added.

    The two may stand on the same observations. Where one has over `RIVALS` times the evidence it
    counts alone: a weak view that is heard again and again would in the end outweigh a strong one
    that is not. Else both count, and together have the evidence of the greater.

    >>> mine, other = shares_of_rivals(np.array([8.0, 8.0, 0.0]), np.array([8.0, 1.0, 0.0]))
    >>> mine.tolist(), other.tolist()
    ([0.5, 1.0, 1.0], [0.5, 0.0, 0.0])
    """
    most, least = np.maximum(mine, other), np.minimum(mine, other)
    both = np.divide(most, mine + other, out=np.zeros_like(most), where=most > 0.0)
    rivals = (most > 0.0) & (RIVALS * least >= most)
    return np.where(rivals, both, mine >= other), np.where(rivals, both, other > mine)


def non_negative(name: str, value: Any) -> float:
    """``value`` as a float; ValueError with ``name`` unless it is in [0, `LARGEST`].

    >>> non_negative("step_s", 0.02)
    0.02
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None
    if not 0.0 <= number <= LARGEST:
        raise ValueError(f"{name} must be in [0, {LARGEST:g}], got {number!r}")
    return number


def whole(name: str, value: Any) -> int:
    """``value`` as an int; ValueError with ``name`` unless it is a whole number >= 0."""
    number = non_negative(name, value)
    if number != int(number):
        raise ValueError(f"{name} must be a whole number, got {number!r}")
    return int(number)


def pack(array: F64) -> State:
    """A float array as plain values: shape and little-endian bytes."""
    return {"shape": list(array.shape), "data": array.astype("<f8").tobytes()}


def unpack(state: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> F64:
    """The array packed under ``name``; ValueError unless it is finite and of ``shape``."""
    try:
        packed = state[name]
        if tuple(packed["shape"]) != shape:
            raise ValueError(f"{name} has shape {packed['shape']}, expected {list(shape)}")
        array = np.frombuffer(packed["data"], "<f8").reshape(shape).astype(np.float64)
    except (KeyError, TypeError) as error:
        raise ValueError(f"state without a usable {name!r}: {error!r}") from None
    if not np.isfinite(array).all():
        raise ValueError(f"{name} is not finite")
    return array
