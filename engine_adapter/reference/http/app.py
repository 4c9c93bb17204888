"""The endpoints: a checked body becomes requests to the engine, and its replies a response."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import FastAPI, Header, Request, Response
from pydantic import BaseModel

from smartspec.engine_adapter.reference.commands import Submit
from smartspec.engine_adapter.reference.http import answers, errors, responses
from smartspec.engine_adapter.reference.http.authorization import RequireKey
from smartspec.engine_adapter.reference.http.dialects import ChatDialect, Dialect, TextDialect
from smartspec.engine_adapter.reference.http.engine_client import (
    RETRY_AFTER_S,
    EngineClient,
    Generation,
)
from smartspec.engine_adapter.reference.http.errors import ApiError, ErrorBody
from smartspec.engine_adapter.reference.http.limits import BodyLimits, Limits
from smartspec.engine_adapter.reference.http.metrics import (
    CONTENT_TYPE,
    CountResponses,
    Metrics,
)
from smartspec.engine_adapter.reference.http.schemas import (
    HEADER_PREFIX,
    HEADERS,
    ChatBody,
    CompletionBody,
    GenerationBody,
    Speculation,
    SpeculationHeaders,
    StreamOptions,
)
from smartspec.engine_adapter.reference.http.tokenization import Tokenization
from smartspec.engine_adapter.reference.replies import Ready

DEFAULT_COMPLETION_TOKENS = 16  #: OpenAI's, for /v1/completions
STATUS_LEFT = 499  #: nobody reads it; it is what metrics count

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "Something to change in the request."},
    401: {"model": ErrorBody, "description": "No valid API key."},
    404: {"model": ErrorBody, "description": "No such model."},
    408: {"model": ErrorBody, "description": "The body did not arrive in time."},
    413: {"model": ErrorBody, "description": "The body is too large."},
    429: {"model": ErrorBody, "description": "All places are taken: see Retry-After."},
    503: {"model": ErrorBody, "description": "Starting or shutting down: see Retry-After."},
    504: {"model": ErrorBody, "description": "Not answered in time."},
}


class Server:
    """What the endpoints share.

    Parameters
    ----------
    engine, tokenization : may still be starting
    limits, metrics : see there
    served_model_name : the model's name outside; None: the engine's own
    """

    def __init__(
        self,
        engine: EngineClient,
        tokenization: Tokenization,
        limits: Limits,
        metrics: Metrics,
        served_model_name: str | None = None,
    ) -> None:
        self.engine = engine
        self.tokenization = tokenization
        self.limits = limits
        self.metrics = metrics
        self._served_model_name = served_model_name
        self._started_at = int(time.time())

    def require_ready(self) -> Ready:
        """The engine's facts. Raises `ApiError` (503) unless requests are taken."""
        facts = self.engine.require_ready()
        if not self.tokenization.loaded:
            raise ApiError(
                503,
                "the tokenizer is being loaded; try again when /health/ready answers with 200",
                code="starting",
                retry_after_s=RETRY_AFTER_S,
            )
        return facts

    def model(self) -> responses.Model:
        facts = self.require_ready()
        return responses.Model(
            id=self._served_model_name or facts.model,
            created=self._started_at,
            max_model_len=facts.max_model_len,
        )

    def require_model(self, name: str | None) -> responses.Model:
        """The model served. Raises `ApiError` (404) when another is asked for."""
        model = self.model()
        if name is not None and name != model.id:
            raise ApiError(
                404,
                f"the model {name!r} is not served here; ask for {model.id!r}",
                param="model",
                code="model_not_found",
            )
        return model

    async def answer(
        self,
        http: Request,
        body: GenerationBody,
        speculation: Speculation,
        generation: Generation,
        prompts: list[list[int]],
        default_max_tokens: int | None,
        dialect: Dialect,
        name: str,
    ) -> Response:
        """Submit ``n`` requests per prompt; their answers as the body asks for them.

        Takes over ``generation``: it is closed when the response is out.
        """
        facts = self.require_ready()
        max_tokens = body.max_completion_tokens or body.max_tokens or default_max_tokens
        for prompt in prompts:
            check_prompt(prompt, max_tokens, facts)
        for number, (prompt, sample) in enumerate((p, i) for p in prompts for i in range(body.n)):
            generation.submit(
                Submit(
                    id=f"{name}-{number}",
                    prompt_token_ids=prompt,
                    max_tokens=max_tokens,
                    stop=body.stop_strings,
                    temperature=body.temperature,
                    top_p=body.top_p,
                    top_k=max(body.top_k, 0),
                    seed=None if body.seed is None else body.seed + sample,
                    weight=speculation.weight,
                    max_speculation_length=speculation.max_length if speculation.enabled else 0,
                    ignore_eos=body.ignore_eos,
                    token_time_target_s=speculation.token_time_target_s,
                    logprobs=body.num_top_logprobs,
                )
            )
        num_prompt_tokens = sum(map(len, prompts))
        timeout_s = self.limits.request_timeout_s
        if body.stream:
            options = body.stream_options or StreamOptions()
            events = answers.stream(generation, dialect, options, num_prompt_tokens)
            return answers.EventStream(generation, events, timeout_s, self.metrics.disconnected)
        with generation:
            try:
                async with answers.within(timeout_s):
                    parts = await answers.unless_disconnected(
                        http.receive, answers.collect(generation)
                    )
            except answers.ClientDisconnected:
                self.metrics.disconnected()
                return Response(status_code=STATUS_LEFT)
            usage = answers.usage_of(generation, num_prompt_tokens)
        content = dialect.whole(parts, usage).model_dump_json()
        return Response(content, media_type="application/json")


def refuse_unknown_headers(names: Iterable[str]) -> None:
    """Raise `ApiError` for headers that look like ours and are not."""
    if unknown := sorted(
        name for name in names if name.startswith(HEADER_PREFIX) and name not in HEADERS
    ):
        raise ApiError(
            400,
            f"unknown headers: {', '.join(unknown)}; known are {', '.join(sorted(HEADERS))}",
            param=unknown[0],
            code="unknown_parameter",
        )


def check_prompt(prompt: list[int], max_tokens: int | None, facts: Ready) -> None:
    """Raise `ApiError` for what the engine would refuse."""
    wanted = max_tokens or 1
    if len(prompt) + wanted > facts.max_model_len:
        raise ApiError(
            400,
            f"a prompt of {len(prompt)} tokens and an answer of up to {wanted} exceed the model's "
            f"{facts.max_model_len} tokens; shorten the prompt or ask for fewer tokens",
            param="prompt",
            code="context_length_exceeded",
        )
    if not prompt:
        raise ApiError(
            400, "the prompt holds no token; send some text", param="prompt", code="invalid_value"
        )
    if max(prompt) >= facts.vocabulary_size:
        raise ApiError(
            400,
            f"the prompt's token ids must be below the vocabulary's size {facts.vocabulary_size}",
            param="prompt",
            code="invalid_value",
        )


def build_app(server: Server, keys: Iterable[str] = ()) -> FastAPI:
    """The application: endpoints, errors, and what guards them."""
    app = FastAPI(
        title="SmartSpec reference worker",
        version=version("smartspec"),
        docs_url=None,  # both pages load scripts from elsewhere
        redoc_url=None,
    )
    engine, metrics = server.engine, server.metrics

    @app.post("/v1/completions", responses=_answers(responses.Completion))
    async def completions(
        http: Request, body: CompletionBody, headers: Annotated[SpeculationHeaders, Header()]
    ) -> Response:
        """Continue a text."""
        refuse_unknown_headers(http.headers)
        speculation = headers.under(body.speculation)
        model = server.require_model(body.model)
        given = body.prompts
        generation = engine.reserve(len(given) * body.n)
        try:
            prompts = [
                await server.tokenization.text(prompt) if isinstance(prompt, str) else prompt
                for prompt in given
            ]
            name = f"cmpl-{uuid.uuid4().hex}"
            dialect = TextDialect(name, model.id, body.num_top_logprobs is not None)
            return await server.answer(
                http,
                body,
                speculation,
                generation,
                prompts,
                DEFAULT_COMPLETION_TOKENS,
                dialect,
                name,
            )
        except BaseException:
            generation.close()
            raise

    @app.post("/v1/chat/completions", responses=_answers(responses.ChatCompletion))
    async def chat_completions(
        http: Request, body: ChatBody, headers: Annotated[SpeculationHeaders, Header()]
    ) -> Response:
        """Answer a conversation. Without max_completion_tokens: as long as there is room."""
        refuse_unknown_headers(http.headers)
        speculation = headers.under(body.speculation)
        model = server.require_model(body.model)
        generation = engine.reserve(body.n)
        try:
            plain = [message.plain() for message in body.messages]
            prompts = [await server.tokenization.chat(plain)]
            name = f"chatcmpl-{uuid.uuid4().hex}"
            dialect = ChatDialect(name, model.id, body.num_top_logprobs is not None)
            return await server.answer(
                http, body, speculation, generation, prompts, None, dialect, name
            )
        except BaseException:
            generation.close()
            raise

    @app.get("/v1/models", responses=_some(401, 503))
    async def models() -> responses.ModelList:
        """The one model that is served."""
        return responses.ModelList(data=[server.model()])

    @app.get("/v1/models/{name:path}", responses=_some(401, 404, 503))
    async def model(name: str) -> responses.Model:
        return server.require_model(name)

    @app.get("/health/live", responses=_some(503))
    async def live() -> responses.Health:
        """Whether this process does its work, or should be started again."""
        if engine.state == "dead":
            engine.require_ready()
        return responses.Health(status="live")

    @app.get("/health", responses=_some(503))
    @app.get("/health/ready", responses=_some(503))
    async def ready() -> responses.Health:
        """Whether requests are taken."""
        server.require_ready()
        return responses.Health(status="ready")

    @app.get("/metrics", response_class=Response)
    async def scrape() -> Response:
        """For Prometheus."""
        stats = await engine.stats()
        num_tasks = len(asyncio.all_tasks())
        content = metrics.exposition(stats, engine.num_in_flight, num_tasks)
        return Response(content, media_type=CONTENT_TYPE)

    errors.install(app)
    paths = frozenset(route.path for route in app.routes if hasattr(route, "path"))
    app.add_middleware(BodyLimits, limits=server.limits)
    app.add_middleware(RequireKey, keys=tuple(keys))
    app.add_middleware(CountResponses, metrics=metrics, paths=paths)
    app.openapi = lambda: _description(app)  # type: ignore[method-assign]
    return app


def _answers(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    # Of each event, as checkers of descriptions read it.
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    streamed = {"text/event-stream": {"schema": event}}
    return {200: {"model": model, "content": streamed}, **_ERRORS}


def _some(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: _ERRORS[status] for status in statuses}


def _description(app: FastAPI) -> dict[str, Any]:
    """OpenAPI, without the 422 that FastAPI adds: what is invalid here is answered with 400."""
    if app.openapi_schema is None:
        schema = FastAPI.openapi(app)
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
    assert app.openapi_schema is not None
    return app.openapi_schema
