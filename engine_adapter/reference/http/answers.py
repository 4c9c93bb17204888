"""From the engine's replies to a response: all at once, or as a stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from smartspec.engine_adapter.reference.http import responses
from smartspec.engine_adapter.reference.http.dialects import Dialect, Part
from smartspec.engine_adapter.reference.http.engine_client import Generation
from smartspec.engine_adapter.reference.http.errors import ApiError
from smartspec.engine_adapter.reference.http.schemas import StreamOptions

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


class ClientDisconnected(Exception):
    """Nobody reads the answer any more."""


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
        token_time=_token_time(generation),
    )


def _token_time(generation: Generation) -> responses.TokenTime | None:
    target_s = generation.choices[0].token_time_target_s  # one request's choices share it
    if target_s is None:
        return None
    times = [c.token_time_s for c in generation.choices if c.token_time_s is not None]
    measured_s = max(times, default=None) if generation.done else None
    met = None if measured_s is None else measured_s <= target_s
    return responses.TokenTime(target_s=target_s, measured_s=measured_s, met=met)


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
            offsets[index] = part.end_offset
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


@asynccontextmanager
async def within(timeout_s: float) -> AsyncIterator[None]:
    """Context that ends with `ApiError` (504) after so many seconds."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise ApiError(
            504,
            f"not answered within {timeout_s:g} s; ask for fewer tokens, or when there is less "
            "load",
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
        await asyncio.gather(working, leaving, return_exceptions=True)
