"""What the worker process says: one JSON object per line; `event` tells them apart."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec


class _Reply(msgspec.Struct, frozen=True, tag_field="event"):
    pass


class Ready(_Reply, frozen=True, tag="ready", kw_only=True):
    """The first line: the worker's facts, which are what a daemon wants to know of it too."""

    model: str
    draft_model: str  #: "" without one
    proposer: str
    features: tuple[str, ...]  #: rows of `DecodeBatch.features`
    max_length: int  #: longest speculation length
    own_length: int  #: static length without a daemon
    max_num_running: int
    max_model_len: int
    device: str
    dtype: str
    engine_version: str
    tokenizer: str = ""  #: what transformers loads it by: a directory, or an id
    vocabulary_size: int = 0


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A token's text and the natural logarithm of its probability."""

    token: str
    logprob: float
    raw: list[int] | None = None  #: its bytes, where it is not all of a character


class ScoredToken(msgspec.Struct, frozen=True, omit_defaults=True):
    """A token of the answer, and the likeliest in its place, best first."""

    token: str
    logprob: float
    top: list[TokenLogprob]
    raw: list[int] | None = None  #: as of `TokenLogprob`


class Token(_Reply, frozen=True, tag="token", omit_defaults=True):
    """A request's new tokens in a step; a text that may begin a stop string is held back."""

    id: str
    text: str
    num_tokens: int  #: in the answer so far
    t_s: float  #: since the worker's start
    logprobs: list[ScoredToken] | None = None


class Finished(_Reply, frozen=True, tag="finished"):
    """The last line about a request: "eos", "stop" (string), "length" or "cancelled"."""

    id: str
    reason: str
    num_tokens: int
    num_drafted: int
    num_accepted: int
    time_to_first_token_s: float | None
    latency_s: float
    t_s: float
    token_time_s: float | None = None  #: mean per token after the first


class Error(_Reply, frozen=True, tag="error"):
    """A line or a request was refused; ``id`` where it is known whose."""

    id: str | None
    message: str


class Stats(_Reply, frozen=True, tag="stats"):
    """The answer to `commands.Stats`."""

    t_s: float
    num_running: int
    num_waiting: int
    kv_usage: float  #: share of the KV room that holds tokens, 0 to 1
    mode: str
    link: dict[str, Any] | None
    busy_s: float  #: in steps, since the start
    num_steps: int
    num_tokens: int
    num_drafts: int  #: requests drafted for, summed over steps
    num_drafted: int
    num_accepted: int
    num_accepted_per_position: list[int]  #: place j: drafts of which at least j + 1 were accepted


class Step(_Reply, frozen=True, tag="step"):
    """What a step did, when the worker was started to tell it."""

    t_s: float
    num_running: int
    num_waiting: int
    num_prefill_tokens: int
    lengths: list[int]
    num_drafted: list[int]
    num_accepted: list[int]
    source: str
    step_s: float
    target_s: float | None
    draft_s: float | None


class Held(_Reply, frozen=True, tag="held"):
    """No step is under way, and none begins until it is told to go on."""

    t_s: float


class Stopped(_Reply, frozen=True, tag="stopped"):
    """The last line."""


Reply: TypeAlias = Ready | Token | Finished | Error | Stats | Step | Held | Stopped

decode = msgspec.json.Decoder(Reply).decode
encode = msgspec.json.Encoder().encode
