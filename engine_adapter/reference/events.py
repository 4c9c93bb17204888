"""What a step tells the outside: new tokens, finished requests, refusals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from smartspec.engine_adapter.base import StepFacts


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities at temperature 1, before top-p and top-k."""

    token: int
    logprob: float
    top: list[tuple[int, float]]  #: the likeliest tokens, best first


@dataclass(frozen=True, slots=True)
class Tokens:
    """A request's new tokens in this step; text that may begin a stop string is held back."""

    id: int
    tokens: list[int]
    text: str
    num_tokens: int  #: in the answer so far
    logprobs: list[TokenLogprobs] | None = None  #: of `tokens`, where they were asked for


@dataclass(frozen=True, slots=True)
class Finished:
    """A request is done: "eos", "stop" (string), "length" or "cancelled"."""

    id: int
    reason: str
    tokens: list[int]  #: the whole answer; an EOS token is part of it
    text: str  #: the whole answer, without the stop string
    num_drafted: int
    num_accepted: int
    time_to_first_token_s: float | None  #: from add_request()
    latency_s: float  #: from add_request()
    token_time_s: float | None  #: mean per token after the first; None where there is none


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that can never run."""

    id: int
    message: str


Event: TypeAlias = Tokens | Finished | Refused


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Events of one step, and what it reported (None when there was nothing to run)."""

    events: list[Event]
    facts: StepFacts | None = None
    lengths: npt.NDArray[np.int64] | None = None  #: chosen, [B]
    source: str = ""  #: of the choice
