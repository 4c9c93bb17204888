"""A request and its state while the worker decodes it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from smartspec.engine_adapter.reference.detokenizer import Detokenizer

GREEDY_BELOW = 1e-4  #: temperatures below this are greedy decoding
NEVER_DRAFTED = -1.0  #: last accepted share of a request that was never drafted for
MAX_TOP_LOGPROBS = 20  #: alternatives per token that a request may ask for


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn from the target's distribution.

    Parameters
    ----------
    temperature : >= 0; 0 is greedy
    top_p : in (0, 1], smallest set of tokens with this share of the probability; 1: all
    top_k : >= 0, the k likeliest tokens; 0: all. Applied before `top_p`
    seed : the same seed, prompt and parameters give the same tokens, under any speculation; None:
        a random one
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < 1e4:
            raise ValueError(f"temperature must be in [0, 10000), got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.top_k < 1 << 31:
            raise ValueError(f"top_k must be in [0, 2**31), got {self.top_k}")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of the worker.

    Parameters
    ----------
    prompt : token ids, at least one
    max_tokens : longest answer, >= 1; None: as long as there is room
    stop : strings that end the answer; they are left out of its text
    weight : in [1e-6, 1e6], value of one of its tokens
    floor : shortest speculation length (clipped to what is possible)
    max_speculation_length : longest speculation length; 0 opts out; None: the worker's
    ignore_eos : go on after the end-of-sequence token
    token_time_target_s : seconds per output token that the client wants to stay below, > 0; None:
        it names none
    num_logprobs : likeliest alternatives, in [0, 20], told with the log-probability of each token;
        None: no log-probabilities
    """

    prompt: list[int]
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    weight: float = 1.0
    floor: int = 0
    max_speculation_length: int | None = None
    ignore_eos: bool = False
    token_time_target_s: float | None = None
    num_logprobs: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("prompt must hold at least one token")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, got {self.max_tokens}")
        if not 1e-6 <= self.weight <= 1e6:
            raise ValueError(f"weight must be in [1e-6, 1e6], got {self.weight}")
        if self.floor < 0 or (self.max_speculation_length or 0) < 0:
            raise ValueError("floor and max_speculation_length must be >= 0")
        if not all(self.stop):
            raise ValueError("stop strings must not be empty")
        target_s = self.token_time_target_s
        if target_s is not None and not 0 < target_s < math.inf:
            raise ValueError(f"token_time_target_s must be finite and > 0, got {target_s}")
        if self.num_logprobs is not None and not 0 <= self.num_logprobs <= MAX_TOP_LOGPROBS:
            raise ValueError(
                f"num_logprobs must be in [0, {MAX_TOP_LOGPROBS}], got {self.num_logprobs}"
            )


class Sequence:
    """One request being decoded: its tokens, and how many of them the target has in its KV cache.

    A decoding sequence always has exactly one token, the last, that is not in the cache yet: the
    next pass feeds it, followed by the drafts.
    """

    __slots__ = (
        "added_s",
        "detokenizer",
        "first_token_s",
        "id",
        "last_share",
        "max_tokens",
        "num_accepted",
        "num_computed",
        "num_drafted",
        "num_prompt",
        "request",
        "row",
        "seed",
        "tokens",
    )

    def __init__(
        self,
        sequence_id: int,
        request: Request,
        max_tokens: int,
        seed: int,
        added_s: float,
        detokenizer: Detokenizer | None = None,
    ) -> None:
        self.id = sequence_id
        self.request = request
        self.tokens = list(request.prompt)
        self.num_prompt = len(request.prompt)
        self.max_tokens = max_tokens
        self.seed = seed
        self.detokenizer = detokenizer
        self.row = -1  # of the KV cache; -1 while waiting
        self.num_computed = 0  # tokens whose keys and values the target's cache holds
        self.num_drafted = 0
        self.num_accepted = 0
        self.last_share = NEVER_DRAFTED
        self.added_s = added_s
        self.first_token_s: float | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def decoding(self) -> bool:
        """Whether the prompt is done, so that the next pass brings answer tokens."""
        return self.num_computed == len(self.tokens) - 1 and self.num_output > 0

    @property
    def num_remaining(self) -> int:
        """Answer tokens that may still come."""
        return self.max_tokens - self.num_output
