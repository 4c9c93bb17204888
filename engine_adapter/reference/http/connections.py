"""Bounds on connections, of which uvicorn has none: how many, and how long without a request."""

from __future__ import annotations

import asyncio

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from smartspec.engine_adapter.reference.http.authorization import GUARDED
from smartspec.engine_adapter.reference.http.engine_client import RETRY_AFTER_S
from smartspec.engine_adapter.reference.http.errors import ApiError
from smartspec.engine_adapter.reference.http.metrics import Metrics


class RefuseConnection:
    """The application of connections beyond the bound: refuses /v1.

    Health and metrics pass to ``app``: a crowd is no reason to start the server again, and every
    reason to look at it.
    """

    def __init__(self, app: ASGIApp, max_num_connections: int, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._max_num_connections = max_num_connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(GUARDED):
            await self._app(scope, receive, send)
            return
        # What passes is counted by the application itself.
        self._metrics.response("other", 503)
        error = ApiError(
            503,
            f"all {self._max_num_connections} connections are taken; try again later, keep fewer "
            "open, or raise --max-num-connections",
            code="too_many_connections",
            retry_after_s=RETRY_AFTER_S,
        )
        error.headers["connection"] = "close"
        await error.response()(scope, receive, send)


def bounded_protocol(
    max_num_connections: int, head_timeout_s: float, refuse: ASGIApp
) -> type[H11Protocol]:
    """uvicorn's protocol with bounds.

    Parameters
    ----------
    max_num_connections : further ones are answered by ``refuse``
    head_timeout_s : for a request's head to be complete, from the connection's begin or the last
        response; then the connection is closed, since there is nothing to answer yet
    """

    class Bounded(H11Protocol):
        _head_due: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > max_num_connections:
                self.app = refuse
            self._await_head()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if not self.transport.is_closing():
                self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self._head_due is not None:
                self._head_due.cancel()

        def _await_head(self) -> None:
            if self._head_due is not None:
                self._head_due.cancel()
            self._head_due = self.loop.call_later(head_timeout_s, self._check_head)

        def _check_head(self) -> None:
            if self.conn.their_state is h11.IDLE:
                self.transport.close()

    return Bounded
