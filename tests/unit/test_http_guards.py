"""What guards the HTTP endpoints: bounds on bodies, keys, addresses, headers under bodies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from smartspec.engine_adapter.reference.http.authorization import (
    KeyFileError,
    RequireKey,
    load_keys,
)
from smartspec.engine_adapter.reference.http.limits import BodyLimits, Limits
from smartspec.engine_adapter.reference.http.schemas import (
    NEUTRAL_VALUES,
    ChatBody,
    ChatMessage,
    CompletionBody,
    Speculation,
    SpeculationHeaders,
)
from smartspec.engine_adapter.reference.http.service import AddressError, listen

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
