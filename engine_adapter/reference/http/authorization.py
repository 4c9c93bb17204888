"""API keys: who may use /v1."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from smartspec.engine_adapter.reference.http.errors import ApiError

VARIABLE = "SMARTSPEC_API_KEY"
GUARDED = "/v1/"


class KeyFileError(ValueError):
    """The file of API keys cannot be used."""


def load_keys(path: Path | None, env: Mapping[str, str]) -> tuple[str, ...]:
    """Keys from a file, one a line (so that keys can be changed without a gap), or the environment.

    Never from the command line, which every user of a machine can read. None are no guard at all.
    Raises `KeyFileError`.
    """
    if path is None:
        return tuple(key for key in (env.get(VARIABLE, "").strip(),) if key)
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"--api-key-file {path}: cannot be read: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise KeyFileError(f"--api-key-file {path}: holds no key; write one a line")
    return keys


class RequireKey:
    """Lets requests below /v1 pass with ``Authorization: Bearer <key>`` only."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._keys and scope["type"] == "http" and scope["path"].startswith(GUARDED):
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            sent = given.strip().encode("latin-1")
            # All of them, always: the time tells nothing.
            matches = [hmac.compare_digest(sent, key) for key in self._keys]
            if scheme.lower() != "bearer" or not any(matches):
                refusal = ApiError(
                    401,
                    "no valid API key; send it as 'Authorization: Bearer <key>'",
                    code="invalid_api_key",
                )
                await refusal.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)
