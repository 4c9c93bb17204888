"""What guards the HTTP endpoints: bounds on bodies and connections, keys, addresses, waits."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from pydantic import ValidationError
from uvicorn.server import ServerState

from smartspec.engine_adapter.reference.http.authorization import (
    KeyFileError,
    RequireKey,
    load_keys,
)
from smartspec.engine_adapter.reference.http.connections import RefuseConnection, bounded_protocol
from smartspec.engine_adapter.reference.http.limits import BodyLimits, Limits
from smartspec.engine_adapter.reference.http.metrics import Metrics
from smartspec.engine_adapter.reference.http.schemas import (
    NEUTRAL_VALUES,
    ChatBody,
    ChatMessage,
    CompletionBody,
    Speculation,
    SpeculationHeaders,
)
from smartspec.engine_adapter.reference.http.service import AddressError, listen
from smartspec.engine_adapter.reference.http.turnover import Turnover

SMALL = Limits(max_body_bytes=10, body_timeout_s=0.05)


class Echo:
    """An application that answers with the body that it got."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def statuses(app: Any, messages: Iterable[dict[str, Any]], **scope: Any) -> list[int]:
    """Statuses that ``app`` answers with when these messages come, and then nothing."""
    sent: list[dict[str, Any]] = []
    coming = iter(messages)

    async def receive() -> dict[str, Any]:
        for message in coming:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    full = {"type": "http", "method": "POST", "path": "/v1/x", "headers": []} | scope
    asyncio.run(app(full, receive, send))
    return [message["status"] for message in sent if "status" in message]


def part(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def test_body_passes_whole_when_it_is_within_bounds() -> None:
    echo = Echo()
    assert statuses(BodyLimits(echo, SMALL), [part(b"01234", True), part(b"56789")]) == [200]
    assert echo.bodies == [b"0123456789"]


@pytest.mark.parametrize(
    ("messages", "headers"),
    [
        ([part(b"0" * 11)], []),
        ([part(b"0" * 6, True), part(b"0" * 6, True)], []),
        ([], [(b"content-length", b"11")]),
    ],
)
def test_body_is_refused_when_it_is_too_large(messages: Any, headers: Any) -> None:
    echo = Echo()
    assert statuses(BodyLimits(echo, SMALL), messages, headers=headers) == [413]
    assert echo.bodies == []


def test_body_is_refused_when_it_does_not_come() -> None:
    assert statuses(BodyLimits(Echo(), SMALL), [part(b"0", True)]) == [408]


def test_nothing_is_answered_when_the_client_leaves_within_its_body() -> None:
    gone = [part(b"0", True), {"type": "http.disconnect"}]
    assert statuses(BodyLimits(Echo(), SMALL), gone) == []


GET = b"GET / HTTP/1.1\r\nhost: t\r\n\r\n"


@contextlib.asynccontextmanager
async def bounded(app: Any, max_num_connections: int, head_timeout_s: float) -> AsyncIterator[int]:
    """The port of a server with bounds on its connections."""
    refuse = RefuseConnection(app, max_num_connections, Metrics())
    http = bounded_protocol(max_num_connections, head_timeout_s, refuse)
    config = uvicorn.Config(app, http=http, lifespan="off", log_config=None)
    config.load()
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: http(config=config, server_state=state, app_state={}), "127.0.0.1", 0
    )
    async with server:
        yield server.sockets[0].getsockname()[1]
        for connection in list(state.connections):
            connection.shutdown()
    await asyncio.sleep(0)  # their transports are closed in the loop's next turn


def test_connection_is_closed_when_no_request_comes() -> None:
    """None at all, half of one, none after the first; one that takes its time is not cut off."""
    timeout_s = 0.5

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(3 * timeout_s)
        await Echo()(scope, receive, send)

    async def ends(port: int, sent: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        received = await reader.read()  # to the end
        writer.close()
        await writer.wait_closed()
        return received

    async def scenario() -> list[bytes]:
        async with bounded(slow, 10, timeout_s) as port:
            return list(await asyncio.gather(*(ends(port, sent) for sent in (b"", GET[:9], GET))))

    nothing, half, whole = asyncio.run(scenario())
    assert (nothing, half) == (b"", b"")
    assert whole.startswith(b"HTTP/1.1 200")


def test_connection_is_refused_in_words_when_there_are_too_many() -> None:
    async def scenario() -> tuple[bytes, bytes]:
        async with bounded(Echo(), 1, 60.0) as port:
            first = await asyncio.open_connection("127.0.0.1", port)
            second = await asyncio.open_connection("127.0.0.1", port)
            second[1].write(GET.replace(b" / ", b" /health "))
            health = await second[0].readline()
            second[1].write(GET.replace(b" / ", b" /v1/models "))
            refusal = await second[0].read()
            for _, writer in (first, second):
                writer.close()
                await writer.wait_closed()
            return health, refusal

    health, refusal = asyncio.run(scenario())
    assert health.startswith(b"HTTP/1.1 200"), "health and metrics pass"
    head, _, body = refusal[refusal.index(b"HTTP/1.1") :].partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503")
    assert b"retry-after: 1" in head
    assert json.loads(body)["error"]["code"] == "too_many_connections"


def test_wait_is_reckoned_from_ends_while_others_waited() -> None:
    ends_s = [100.0, 102.0, 103.0, 106.0, *[107.0] * 100]
    coming = iter(ends_s)
    turnover = Turnover(clock=lambda: next(coming))
    assert turnover.wait_s(5) == 1, "nothing is known"
    for _ in ends_s[:4]:
        turnover.ended(others_waited=True)
    assert turnover.wait_s(1) == 2
    assert turnover.wait_s(4) == 8
    assert turnover.wait_s(1000) == 60, "clients believe no more"
    turnover.ended(others_waited=False)
    assert turnover.wait_s(4) == 1, "quiet times tell nothing"
    for _ in ends_s[4:]:
        turnover.ended(others_waited=True)
    assert turnover.wait_s(4) == 1, "as many as end at once"


@pytest.mark.parametrize(
    ("path", "header", "status"),
    [
        ("/v1/x", None, 401),
        ("/v1/x", b"Bearer wrong", 401),
        ("/v1/x", b"Basic two", 401),
        ("/v1/x", b"Bearer \xff", 401),
        ("/v1/x", b"Bearer two", 200),
        ("/v1/x", b"bearer one", 200),
        ("/health", None, 200),
    ],
)
def test_key_is_asked_for_below_v1(path: str, header: bytes | None, status: int) -> None:
    headers = [] if header is None else [(b"authorization", header)]
    app = RequireKey(Echo(), ("one", "two"))
    assert statuses(app, [part(b"")], path=path, headers=headers) == [status]


def test_everybody_is_served_when_there_is_no_key() -> None:
    assert statuses(RequireKey(Echo(), ()), [part(b"")]) == [200]


def test_keys_come_from_the_file_or_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("old\n\n new \n")
    env = {"SMARTSPEC_API_KEY": " from-env "}
    assert load_keys(path, env) == ("old", "new")
    assert load_keys(None, env) == ("from-env",)
    assert load_keys(None, {}) == ()
    path.write_text("\n")
    with pytest.raises(KeyFileError, match="holds no key"):
        load_keys(path, env)
    with pytest.raises(KeyFileError, match="cannot be read"):
        load_keys(tmp_path / "none", env)


@pytest.mark.parametrize("address", ["8000", ":8000", "host:", "a:99999", "127.0.0.1:-1"])
def test_address_is_refused_when_it_is_none(address: str) -> None:
    with pytest.raises(AddressError, match="expected HOST:PORT"):
        listen(address)


def test_address_is_refused_when_it_is_taken() -> None:
    with listen("127.0.0.1:0") as sock:
        with pytest.raises(AddressError, match="cannot listen there"):
            listen(f"127.0.0.1:{sock.getsockname()[1]}")


def test_body_comes_before_headers_and_headers_before_defaults() -> None:
    headers = SpeculationHeaders.model_validate(
        {"x_smartspec_enabled": "off", "x_smartspec_max_length": "3", "x_smartspec_weight": "2"}
    )
    assert headers.under(Speculation()) == Speculation(enabled=False, max_length=3, weight=2.0)
    body = Speculation(enabled=True, token_time_target_s=0.1)
    assert headers.under(body) == Speculation(
        enabled=True, max_length=3, weight=2.0, token_time_target_s=0.1
    )


def test_neutral_values_are_those_that_the_bodies_take() -> None:
    """What an error tells to send is taken, and something else is not."""
    chat = {"messages": [{"role": "user", "content": "x"}]}
    for name, text in NEUTRAL_VALUES.items():
        value = json.loads(text)
        if name in ChatMessage.model_fields:
            model, rest = ChatMessage, {"role": "user", "content": "x"}
        elif name in CompletionBody.model_fields:
            model, rest = CompletionBody, {"prompt": "x"}
        else:
            model, rest = ChatBody, chat
        model.model_validate(rest | {name: value})
        model.model_validate(rest | {name: None})
        for other in (7, "x", ["x"], {"x": 1}, not value):
            if other != value:
                with pytest.raises(ValidationError):
                    model.model_validate(rest | {name: other})
