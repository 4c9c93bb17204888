"""The requests of a run, as columns: when each comes, how long it is, what drafts would bring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Traffic:
    """When requests come and how long they are; aligned columns [R].

    Raises ValueError when the columns differ in size, arrivals fall, or a length is below 1.
    """

    arrival_s: F64  #: [R], not falling, from 0
    num_prompt: I64  #: [R] tokens, >= 1
    num_output: I64  #: [R] tokens of the answer, >= 1

    def __post_init__(self) -> None:
        if not len(self.arrival_s) == len(self.num_prompt) == len(self.num_output):
            raise ValueError("arrival_s, num_prompt and num_output must be equally long")
        if (np.diff(self.arrival_s) < 0).any():
            raise ValueError("arrival_s must not fall: sort the requests by arrival")
        if len(self.arrival_s) and min(self.num_prompt.min(), self.num_output.min()) < 1:
            raise ValueError("num_prompt and num_output must be at least 1")

    @property
    def size(self) -> int:
        return len(self.arrival_s)

    def part(self, at: Any, *, speed_up: float = 1.0) -> Traffic:
        """The requests ``at`` (a slice or indices), the first at 0, ``speed_up`` times as fast."""
        if not speed_up > 0:
            raise ValueError(f"speed_up must be > 0, got {speed_up}")
        arrival = self.arrival_s[at]
        begin = arrival[0] if len(arrival) else 0.0
        return Traffic((arrival - begin) / speed_up, self.num_prompt[at], self.num_output[at])


@dataclass(frozen=True)
class Outcomes:
    """What drafts would bring at every position of every answer.

    An answer's outcomes belong to its positions and not to steps: a step that begins at position p
    and drafts k has ``min(k, run[p])`` accepted, whichever policy chose k. So policies meet the
    same luck, and differences between them are paired.
    """

    offset: I64  #: [R], where each answer's positions begin in the columns below
    run: U8  #: [P], drafts in a row that would be accepted from here
    probability: F32  #: [P], true probability that a draft is accepted here; NaN: not known
    match_length: U8 | None = None  #: [P], tokens that a lookup matched; 0: nothing to draft
    #: what the engine tells of a position in place of the match's length, where it was recorded
    feature_names: tuple[str, ...] = ()
    features: F32 | None = None  #: [F, P], by ``feature_names``
