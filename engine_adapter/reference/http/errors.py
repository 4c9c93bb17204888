"""Errors in OpenAI's shape. Each says what is wrong and what to change."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from smartspec.engine_adapter.reference.http.schemas import NEUTRAL_VALUES

Kind: TypeAlias = Literal[
    "invalid_request_error", "authentication_error", "rate_limit_error", "server_error"
]

_KIND_BY_STATUS: dict[int, Kind] = {401: "authentication_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class ApiError(Exception):
    """A request that is answered with an error.

    Parameters
    ----------
    status : of HTTP
    message : what is wrong, and what to do about it
    param : of the request, where one is to blame
    code : for programs
    retry_after_s : when it is worth trying again; None: the same request will fail again
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers: dict[str, str] = {}
        if retry_after_s is not None:
            self.headers["retry-after"] = str(retry_after_s)
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"

    def body(self) -> bytes:
        """JSON, in ASCII: what is quoted from a request need not be valid text."""
        default: Kind = "server_error" if self.status >= 500 else "invalid_request_error"
        detail = {
            "message": self.message,
            "type": _KIND_BY_STATUS.get(self.status, default),
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": detail}).encode()

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, "application/json")


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """One error for what pydantic found: unknown names first, then the first bad parameter."""
    unknown = [_path(error["loc"]) for error in errors if error["type"] == "extra_forbidden"]
    if unknown:
        names = ", ".join(sorted(unknown))
        return ApiError(
            400,
            f"unknown parameters: {names}; leave them out (docs/worker.md lists what is known)",
            param=min(unknown),
            code="unknown_parameter",
        )
    if any(error["type"] == "json_invalid" for error in errors):
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    if any(error["type"] == "model_attributes_type" for error in errors if len(error["loc"]) == 1):
        return ApiError(
            400,
            "the body is not a JSON object; send one, with Content-Type: application/json",
            code="invalid_json",
        )
    first = errors[0]
    param = _path(first["loc"]) or None
    name = next((part for part in first["loc"][1:] if isinstance(part, str)), "")
    if name in NEUTRAL_VALUES:
        message = (
            f"{name} is not supported by this engine; leave it out, or send {NEUTRAL_VALUES[name]}"
        )
        return ApiError(400, message, param=name, code="unsupported_parameter")
    # A union gives an error for each of its members: they are alternatives.
    same = [_said(error) for error in errors if list(error["loc"][:2]) == list(first["loc"][:2])]
    said = ", or ".join(dict.fromkeys(same))
    return ApiError(400, f"{param or 'the body'}: {said}", param=param, code="invalid_value")


def install(app: FastAPI) -> None:
    """Have every error of ``app`` answered in OpenAI's shape."""

    def api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    def bad_request(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return from_validation(error.errors()).response()

    def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = {
            404: f"there is no {request.url.path} here; docs/worker.md lists the endpoints",
            405: f"{request.url.path} does not take {request.method}; see the Allow header",
        }.get(error.status_code, str(error.detail))
        answer = ApiError(error.status_code, message)
        answer.headers.update(error.headers or {})
        return answer.response()

    def fault(_: Request, error: Exception) -> Response:
        return ApiError(500, "a fault of the server; its log says more").response()

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RequestValidationError, bad_request)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, fault)


def _said(error: Mapping[str, Any]) -> str:
    text = str(error["msg"]).removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


def _path(location: Sequence[int | str]) -> str:
    """``("body", "messages", 0, "content")`` as ``messages.0.content``, without unions' members."""
    parts = [str(part) for part in location if part not in ("body", "header", "query", "path")]
    return ".".join(part for part in parts if not _is_type(part))


def _is_type(part: str) -> bool:
    return part in {"str", "int"} or part.startswith(("list[", "constrained-", "function-"))
