"""The shapes of answers: what text, scores and ends look like at each endpoint."""

from __future__ import annotations

import time
from typing import Any, Protocol

from pydantic import BaseModel

from smartspec.engine_adapter.reference import replies
from smartspec.engine_adapter.reference.http import responses
from smartspec.engine_adapter.reference.http.engine_client import GONE, RETRY_AFTER_S, Event, Lost
from smartspec.engine_adapter.reference.http.errors import ApiError
from smartspec.engine_adapter.reference.http.responses import FinishReason
from smartspec.engine_adapter.reference.replies import ScoredToken, TokenLogprob

_FINISH_REASONS: dict[str, FinishReason] = {"eos": "stop", "stop": "stop", "length": "length"}


class Part:
    """Text and scores of a choice: new in an event, or all there is."""

    __slots__ = ("finish_reason", "scored", "text", "text_offset")

    def __init__(self, text_offset: int = 0) -> None:
        self.text = ""
        self.scored: list[ScoredToken] = []
        self.text_offset = text_offset  #: of the first scored token, in the choice's text
        self.finish_reason: FinishReason | None = None

    @property
    def end_offset(self) -> int:
        """Where the scored tokens end in the choice's text."""
        return self.text_offset + sum(_num_characters(one) for one in self.scored)

    def add(self, event: Event) -> None:
        """Take in a reply. Raises `ApiError` where there will be no answer."""
        match event:
            case replies.Token():
                self.text += event.text
                self.scored += event.logprobs or ()
            case replies.Finished():
                if event.reason not in _FINISH_REASONS:
                    raise ApiError(
                        503,
                        "the server stops and could not wait for this answer; send it elsewhere",
                        code="shutting_down",
                        retry_after_s=RETRY_AFTER_S,
                    )
                self.finish_reason = _FINISH_REASONS[event.reason]
            case replies.Error():
                raise ApiError(400, event.message, code="refused")
            case Lost():
                raise ApiError(503, GONE, code="engine_dead", retry_after_s=RETRY_AFTER_S)


def _bytes(one: ScoredToken | TokenLogprob) -> list[int]:
    return list(one.token.encode()) if one.raw is None else one.raw


def _num_characters(one: ScoredToken) -> int:
    """Characters that begin in a token; the bytes 10xxxxxx go on with one."""
    return sum(byte & 0xC0 != 0x80 for byte in _bytes(one))


class Dialect(Protocol):
    """The shape of one endpoint's answers."""

    def whole(self, parts: list[Part], usage: responses.Usage) -> BaseModel: ...

    def opening(self, index: int) -> BaseModel | None:
        """What comes before a choice's first text."""

    def chunk(self, index: int, part: Part, usage: responses.Usage | None) -> BaseModel: ...

    def closing(self, usage: responses.Usage) -> BaseModel: ...


class _Dialect:
    def __init__(self, name: str, model: str, scored: bool) -> None:
        self._head: dict[str, Any] = {"id": name, "created": int(time.time()), "model": model}
        self._scored = scored  # log-probabilities were asked for


class TextDialect(_Dialect):
    """/v1/completions."""

    def whole(self, parts: list[Part], usage: responses.Usage) -> BaseModel:
        choices = [self._choice(index, part) for index, part in enumerate(parts)]
        return responses.Completion(**self._head, choices=choices, usage=usage)

    def opening(self, index: int) -> None:
        return None

    def chunk(self, index: int, part: Part, usage: responses.Usage | None) -> BaseModel:
        return responses.Completion(**self._head, choices=[self._choice(index, part)], usage=usage)

    def closing(self, usage: responses.Usage) -> BaseModel:
        return responses.Completion(**self._head, choices=[], usage=usage)

    def _choice(self, index: int, part: Part) -> responses.CompletionChoice:
        return responses.CompletionChoice(
            index=index,
            text=part.text,
            logprobs=self._logprobs(part) if self._scored else None,
            finish_reason=part.finish_reason,
        )

    @staticmethod
    def _logprobs(part: Part) -> responses.CompletionLogprobs:
        offsets, offset = [], part.text_offset
        for one in part.scored:
            offsets.append(offset)
            offset += _num_characters(one)
        return responses.CompletionLogprobs(
            text_offset=offsets,
            token_logprobs=[one.logprob for one in part.scored],
            tokens=[one.token for one in part.scored],
            top_logprobs=[
                {top.token: top.logprob for top in reversed(one.top)} | {one.token: one.logprob}
                for one in part.scored
            ],
        )


class ChatDialect(_Dialect):
    """/v1/chat/completions."""

    def whole(self, parts: list[Part], usage: responses.Usage) -> BaseModel:
        choices = [
            responses.ChatChoice(
                index=index,
                message=responses.AssistantMessage(content=part.text),
                logprobs=self._logprobs(part),
                finish_reason=part.finish_reason,
            )
            for index, part in enumerate(parts)
        ]
        return responses.ChatCompletion(**self._head, choices=choices, usage=usage)

    def opening(self, index: int) -> BaseModel:
        delta = responses.Delta(role="assistant", content="")
        return self._chunk(index, delta, None, None, None)

    def chunk(self, index: int, part: Part, usage: responses.Usage | None) -> BaseModel:
        delta = responses.Delta(content=part.text)
        return self._chunk(index, delta, self._logprobs(part), part.finish_reason, usage)

    def closing(self, usage: responses.Usage) -> BaseModel:
        return responses.ChatChunk(**self._head, choices=[], usage=usage)

    def _chunk(
        self,
        index: int,
        delta: responses.Delta,
        logprobs: responses.ChatLogprobs | None,
        finish_reason: FinishReason | None,
        usage: responses.Usage | None,
    ) -> BaseModel:
        choice = responses.ChatChunkChoice(
            index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason
        )
        return responses.ChatChunk(**self._head, choices=[choice], usage=usage)

    def _logprobs(self, part: Part) -> responses.ChatLogprobs | None:
        if not self._scored:
            return None
        content = [
            responses.ChatTokenLogprob(
                token=one.token,
                logprob=one.logprob,
                bytes=_bytes(one),
                top_logprobs=[
                    responses.ChatTopLogprob(
                        token=top.token, logprob=top.logprob, bytes=_bytes(top)
                    )
                    for top in one.top
                ],
            )
            for one in part.scored
        ]
        return responses.ChatLogprobs(content=content)
