"""From the engine's replies to a response: all at once, or as a stream of events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from smartspec.engine_adapter.reference import replies
from smartspec.engine_adapter.reference.http import responses
from smartspec.engine_adapter.reference.http.engine_client import Event, Generation
from smartspec.engine_adapter.reference.http.errors import ApiError
from smartspec.engine_adapter.reference.http.responses import FinishReason
from smartspec.engine_adapter.reference.http.schemas import StreamOptions
from smartspec.engine_adapter.reference.replies import ScoredToken

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
_FINISH_REASONS: dict[str, FinishReason] = {"eos": "stop", "stop": "stop", "length": "length"}


class ClientDisconnected(Exception):
    """Nobody reads the answer any more."""


class Part:
    """Text and scores of a choice: new in an event, or all there is."""

    __slots__ = ("finish_reason", "scored", "text", "text_offset")

    def __init__(self, text_offset: int = 0) -> None:
        self.text = ""
        self.scored: list[ScoredToken] = []
        self.text_offset = text_offset  #: of the first scored token, in the choice's text
        self.finish_reason: FinishReason | None = None

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
                    )
                self.finish_reason = _FINISH_REASONS[event.reason]
            case replies.Error():
                raise ApiError(400, event.message, code="refused")


class Dialect(Protocol):
    """The shape of one endpoint's answers."""

    def whole(self, parts: list[Part], usage: responses.Usage) -> BaseModel: ...

    def opening(self, index: int) -> BaseModel | None:
        """What comes before a choice's first text."""

    def chunk(self, index: int, part: Part, usage: responses.Usage | None) -> BaseModel: ...

    def closing(self, usage: responses.Usage) -> BaseModel: ...


class TextDialect:
    """/v1/completions."""

    def __init__(self, name: str, model: str, scored: bool) -> None:
        self._head: dict[str, Any] = {"id": name, "created": int(time.time()), "model": model}
        self._scored = scored

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
            offset += len(one.token)
        return responses.CompletionLogprobs(
            text_offset=offsets,
            token_logprobs=[one.logprob for one in part.scored],
            tokens=[one.token for one in part.scored],
            top_logprobs=[
                {top.token: top.logprob for top in reversed(one.top)} | {one.token: one.logprob}
                for one in part.scored
            ],
        )


class ChatDialect:
    """/v1/chat/completions."""

    def __init__(self, name: str, model: str, scored: bool) -> None:
        self._head: dict[str, Any] = {"id": name, "created": int(time.time()), "model": model}
        self._scored = scored

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
                bytes=list(one.token.encode()),
                top_logprobs=[
                    responses.ChatTopLogprob(
                        token=top.token, logprob=top.logprob, bytes=list(top.token.encode())
                    )
                    for top in one.top
                ],
            )
            for one in part.scored
        ]
        return responses.ChatLogprobs(content=content)


def usage_of(generation: Generation, num_prompt_tokens: int) -> responses.Usage:
    """So far. The numbers of draft tokens are known when an answer is complete."""
    num_tokens = sum(choice.num_tokens for choice in generation.choices)
    num_drafted = sum(choice.num_drafted for choice in generation.choices)
    num_accepted = sum(choice.num_accepted for choice in generation.choices)
    return responses.Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_tokens,
        total_tokens=num_prompt_tokens + num_tokens,
        num_draft_tokens=num_drafted,
        num_accepted_tokens=num_accepted,
        completion_tokens_details=responses.CompletionTokensDetails(
            accepted_prediction_tokens=num_accepted,
            rejected_prediction_tokens=num_drafted - num_accepted,
        ),
    )


async def collect(generation: Generation) -> list[Part]:
    """The complete answers. Raises `ApiError`."""
    parts = [Part() for _ in generation.choices]
    while not generation.done:
        for index, event in await generation.events():
            parts[index].add(event)
    return parts


async def stream(
    generation: Generation, dialect: Dialect, options: StreamOptions, num_prompt_tokens: int
) -> AsyncIterator[bytes]:
    """Server-sent events, joined as they come: a slow reader gets fewer and longer writes."""
    opened: set[int] = set()
    offsets = [0] * len(generation.choices)
    while not generation.done:
        # What came of a choice since the last write is one chunk.
        parts: dict[int, Part] = {}
        for index, event in await generation.events():
            parts.setdefault(index, Part(offsets[index])).add(event)
        written: list[bytes] = []
        for index, part in parts.items():
            if index not in opened:
                opened.add(index)
                if (opening := dialect.opening(index)) is not None:
                    written.append(_event(opening))
            if not (part.text or part.scored or part.finish_reason):
                continue  # held back: it may be the beginning of a stop string
            offsets[index] += sum(len(one.token) for one in part.scored)
            usage = None
            if options.continuous_usage_stats:
                usage = usage_of(generation, num_prompt_tokens)
            written.append(_event(dialect.chunk(index, part, usage)))
        if written:
            yield b"".join(written)
    if options.include_usage:
        yield _event(dialect.closing(usage_of(generation, num_prompt_tokens)))
    yield DONE


def _event(body: BaseModel) -> bytes:
    return b"data: " + body.model_dump_json().encode() + b"\n\n"


class EventStream(Response):
    """Sends a generation's events, and cancels it when the client leaves or time is up.

    An error that comes after the first byte is an event of its own, since the status is out.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        generation: Generation,
        events: AsyncIterator[bytes],
        timeout_s: float,
        on_disconnect: Callable[[], None],
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._generation = generation
        self._events = events
        self._timeout_s = timeout_s
        self._on_disconnect = on_disconnect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._generation:
            try:
                await unless_disconnected(receive, self._send(send))
            except ClientDisconnected:
                self._on_disconnect()

    async def _send(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        try:
            async with within(self._timeout_s):
                async for body in self._events:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
        except ApiError as error:
            body = b"data: " + error.body() + b"\n\n" + DONE
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class within:  # noqa: N801 (reads as a word)
    """Context that ends with `ApiError` (504) after so many seconds."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._timeout = asyncio.timeout(timeout_s)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *raised: Any) -> None:
        try:
            await self._timeout.__aexit__(*raised)
        except TimeoutError as error:
            raise ApiError(
                504,
                f"not answered within {self._timeout_s:g} s; ask for fewer tokens, or when there "
                "is less load",
                code="request_timeout",
            ) from error


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client leaves: `ClientDisconnected`."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnected
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await _settled(working, leaving)


async def _settled(*tasks: Awaitable[Any]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)
