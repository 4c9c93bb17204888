"""Bounds on what one client can ask of the server, and the middleware that keeps them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smartspec.engine_adapter.reference.http.errors import ApiError


@dataclass(frozen=True, slots=True)
class Limits:
    """What is refused, and when.

    Parameters
    ----------
    max_num_waiting : requests that wait for a place in the batch; further ones get 429
    max_num_connections : open at a time; those beyond get 503. The default leaves room below 1024,
        which is what systems commonly let a process open
    max_body_bytes : of a request; more gets 413
    head_timeout_s : for a request's head to arrive, on a connection that is new or kept alive; then
        the connection is closed
    body_timeout_s : for a request's body to arrive; 408
    request_timeout_s : for a request to be answered; 504, or an error event in a stream
    drain_timeout_s : after SIGTERM, for what runs to finish
    """

    max_num_waiting: int = 256
    max_num_connections: int = 768
    max_body_bytes: int = 2 << 20
    head_timeout_s: float = 30.0
    body_timeout_s: float = 30.0
    request_timeout_s: float = 600.0
    drain_timeout_s: float = 30.0


class BodyLimits:
    """Reads a request's body whole, within bounds, before the application sees it."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                first = await self._read(scope, receive)
        except TimeoutError:
            error = ApiError(
                408,
                f"the body did not arrive within {self._limits.body_timeout_s:g} s; send it faster",
                code="body_timeout",
            )
        except ApiError as refusal:
            error = refusal
        else:
            if first is None:
                return  # the client left

            async def replay() -> Message:
                nonlocal first
                if first is not None:
                    message, first = first, None
                    return message
                return await receive()

            await self._app(scope, replay, send)
            return
        error.headers["connection"] = "close"  # there may be more of the body, that nobody reads
        await error.response()(scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive) -> Message | None:
        bound = self._limits.max_body_bytes
        declared = Headers(scope=scope).get("content-length", "")
        parts: list[bytes] = []
        size = int(declared) if declared.isdecimal() else 0
        more = size <= bound
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size = sum(map(len, parts))
            more = message.get("more_body", False) and size <= bound
        if size > bound:
            raise ApiError(
                413,
                f"the body has more than {bound} bytes; send less, or raise --max-body-bytes",
                code="body_too_large",
            )
        return {"type": "http.request", "body": b"".join(parts), "more_body": False}
