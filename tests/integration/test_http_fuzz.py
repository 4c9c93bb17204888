"""Whatever the description of the endpoints allows, and what it does not, is answered in kind."""

from __future__ import annotations

import pytest
import requests
import schemathesis
from fakes import until
from http_server import HttpServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode, checks
from schemathesis.specs.openapi import checks as openapi_checks

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

ANSWER_TIMEOUT_S = 60  #: far beyond what 256 tokens of a tiny model take: it hangs
HELD = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
]
#: With the number of examples of what fits the description, and of what does not.
ENDPOINTS = [
    ("/v1/completions", "POST", 50, 40),
    ("/v1/chat/completions", "POST", 50, 40),
    # Any path is a name, and without parameters there is nothing to get wrong.
    ("/v1/models/{name}", "GET", 10, 0),
    ("/v1/models", "GET", 1, 0),
    ("/health", "GET", 1, 0),
    ("/health/live", "GET", 1, 0),
    ("/health/ready", "GET", 1, 0),
    ("/metrics", "GET", 1, 0),
]
CASES = [
    pytest.param(path, method, mode, size, id=f"{method} {path} {mode.value}")
    for path, method, *sizes in ENDPOINTS
    for mode, size in zip((GenerationMode.POSITIVE, GenerationMode.NEGATIVE), sizes, strict=True)
    if size
]


@pytest.fixture(scope="module")
def description(http_server: HttpServer) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{http_server.url}/openapi.json")


def test_every_endpoint_is_fuzzed(description: schemathesis.BaseSchema) -> None:
    described = {
        (operation.ok().path, operation.ok().method.upper())
        for operation in description.get_all_operations()
    }
    assert described == {(path, method) for path, method, *_ in ENDPOINTS}


@pytest.mark.parametrize(("path", "method", "mode", "num_examples"), CASES)
def test_server_answers_in_kind_when_requests_are_made_up(
    description: schemathesis.BaseSchema,
    http_server: HttpServer,
    path: str,
    method: str,
    mode: GenerationMode,
    num_examples: int,
) -> None:
    operation = description[path][method]

    with requests.Session() as session:

        @settings(max_examples=num_examples, suppress_health_check=list(HealthCheck))
        @given(data=st.data())
        def send(data: st.DataObject) -> None:
            case = data.draw(operation.as_strategy(generation_mode=mode))
            if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
                case.body.pop("model", None)  # made-up names would all end there
            case.call_and_validate(
                base_url=http_server.url, session=session, checks=HELD, timeout=ANSWER_TIMEOUT_S
            )

        send()


def test_server_is_whole_when_it_was_fuzzed(http_server: HttpServer) -> None:
    until(lambda: http_server.metrics()["smartspec_http_requests_in_flight"] == 0)
    assert http_server.complete(prompt="abc", max_tokens=4)["choices"][0]["finish_reason"]
