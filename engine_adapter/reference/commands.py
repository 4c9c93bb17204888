"""What the worker process is told: one JSON object per line."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

Mode: TypeAlias = Literal["own", "static", "smartspec"]


class Message(msgspec.Struct, frozen=True):
    role: str
    content: str


class _Command(msgspec.Struct, frozen=True, tag_field="op"):
    pass


class Submit(_Command, frozen=True, tag="submit", forbid_unknown_fields=True):
    """A request: ``messages`` (chat), ``prompt`` (text as it is) or ``prompt_token_ids``.

    The other fields are those of `sequence.Request` and `sequence.SamplingParams`.
    """

    id: str
    messages: list[Message] | None = None
    prompt: str | None = None
    max_tokens: int | None = None
    stop: list[str] = []
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    weight: float = 1.0
    floor: int = 0
    max_speculation_length: int | None = None
    ignore_eos: bool = False
    prompt_token_ids: list[int] | None = None
    token_time_target_s: float | None = None
    logprobs: int | None = None


class Cancel(_Command, frozen=True, tag="cancel", forbid_unknown_fields=True):
    id: str


class Speculation(_Command, frozen=True, tag="speculation", forbid_unknown_fields=True):
    """``own``: the worker's own length; ``static``: this one; ``smartspec``: the daemon's."""

    mode: Mode
    length: int | None = None


class Hold(_Command, frozen=True, tag="hold", forbid_unknown_fields=True):
    """Begin no further step until ``resume``, ``stop`` or the end of input; answered with ``held``.

    What is submitted or cancelled meanwhile is answered with the next step.
    """


class Resume(_Command, frozen=True, tag="resume", forbid_unknown_fields=True):
    """Go on after ``hold``."""


class Stats(_Command, frozen=True, tag="stats", forbid_unknown_fields=True):
    pass


class Stop(_Command, frozen=True, tag="stop", forbid_unknown_fields=True):
    pass


decode = msgspec.json.Decoder(Submit | Cancel | Speculation | Hold | Resume | Stats | Stop).decode
