"""The requests of a run, as columns: when each comes, how long it is, what drafts would bring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from smartspec.engine_adapter.lengths import Choice

if TYPE_CHECKING:
    from smartspec.engine_adapter.simulator.copies import Copies
    from smartspec.engine_adapter.simulator.trees import Trees

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]
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


class Accepted(NamedTuple):
    """What became of a step's drafts, [B]."""

    num_accepted: U8
    ranks: U64 | None  #: of trees: bit j is set when the node of rank j is accepted


class Drafted(NamedTuple):
    """What was drafted in a step, and what became of it; columns [B]."""

    num_verified: U8
    num_accepted: U8
    ranks: U64 | None  #: of trees: bit j is set when the node of rank j is accepted, or would be
    num_forwards: int  #: passes of the drafter
    num_draft_tokens: int  #: in these passes
    num_cut: U8 | None = None  #: drafts behind those verified that were not; None: all 0
    num_cut_accepted: U8 | None = None  #: of these, those that would be


class Drafter(Protocol):
    """What drafts in an engine."""

    def draft(self, requests: I64, positions: I64, choice: Choice, lengths: U8) -> Drafted:
        """Up to ``lengths`` [B] at these positions of these requests, both [B].

        ``choice`` : what they were chosen by, with the step's prices where drafts decide
        """


@dataclass(frozen=True)
class Outcomes:
    """What drafts would bring at every position of every answer.

    An answer's outcomes belong to its positions and not to steps: a step that begins at position p
    and drafts k has ``min(k, run[p])`` accepted, whichever policy chose k. So policies meet the
    same luck, and differences between them are paired. With ``trees`` a length is a number of
    nodes, and those accepted are the path that the answer takes through them.
    """

    offset: I64  #: [R], where each answer's positions begin in the columns below
    run: U8  #: [P], drafts in a row that would be accepted from here
    probability: F32  #: [P], true probability that a draft is accepted here; NaN: not known
    match_length: U8 | None = None  #: [P], tokens that a lookup matched; 0: nothing to draft
    #: what the engine tells of a position in place of the match's length, where it was recorded
    feature_names: tuple[str, ...] = ()
    features: F32 | None = None  #: [F, P], by ``feature_names``
    trees: Trees | None = None  #: None: drafts are chains
    copies: Copies | None = None  #: among the branches of trees

    def accepted(self, requests: I64, positions: I64, lengths: U8) -> Accepted:
        """Of drafts of ``lengths`` at these positions of these requests; all [B]."""
        if self.trees is None:
            return Accepted(np.minimum(self.run[positions], lengths), None)
        return self.trees.accepted(requests, positions, lengths)

    def forwards(self, requests: I64, lengths: U8) -> int:
        """Sequential passes of a drafter for these drafts, all requests together."""
        if self.trees is None:
            return int(lengths.max(initial=0))
        return self.trees.forwards(requests, lengths)

    def drafter(self, seed: int) -> Drafter:
        """Who drafts for one engine."""
        if self.copies is None:
            return ByLength(self)
        from smartspec.engine_adapter.simulator.grown import Grown

        return Grown(self, seed)


class ByLength:
    """Drafts as many as it is told to: what they come to is known beforehand."""

    def __init__(self, outcomes: Outcomes) -> None:
        self._outcomes = outcomes

    def draft(self, requests: I64, positions: I64, choice: Choice, lengths: U8) -> Drafted:
        accepted = self._outcomes.accepted(requests, positions, lengths)
        forwards = self._outcomes.forwards(requests, lengths)
        return Drafted(lengths, *accepted, forwards, int(lengths.sum()))
