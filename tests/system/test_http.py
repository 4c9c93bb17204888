"""The worker's HTTP server as clients see it: a real process, real sockets, official clients."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from fakes import until
from http_server import HttpServer, stream_text
from tiny_models import byte_token

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

REPEATED = "abcabcabc abcabcabc abcabcabc"


@pytest.fixture
def client(http_server: HttpServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{http_server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def settled(server: HttpServer) -> dict[str, float]:
    """Metrics once nothing is in flight, here or in the decode process."""
    found: dict[str, float] = {}

    def idle() -> bool:
        found.update(server.metrics())
        names = ("smartspec_http_requests_in_flight", "vllm:num_requests_running")
        return sum(found[name] for name in (*names, "vllm:num_requests_waiting")) == 0

    until(idle)
    return found


# -- the official client --------------------------------------------------------------------------


def test_completion_is_the_same_when_streamed(client: openai.OpenAI) -> None:
    whole = client.completions.create(
        model="tiny", prompt=REPEATED, max_tokens=40, temperature=0, seed=1
    )
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt=REPEATED,
            max_tokens=40,
            temperature=0,
            seed=1,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == (
        whole.choices[0].text
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.to_dict() == whole.usage.to_dict()
    assert whole.usage.completion_tokens <= 40
    assert whole.usage.prompt_tokens == len(REPEATED)
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason in ("stop", "length")
    assert set(reasons[:-1]) == {None}


def test_chat_is_the_same_when_streamed(client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    ]
    whole = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=12, seed=3, user="me", store=False
    )
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=messages, max_completion_tokens=12, seed=3, stream=True
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert whole.choices[0].message.role == "assistant"
    # What was answered can be handed back as it is.
    again = client.chat.completions.create(
        model="tiny",
        messages=[*messages, whole.choices[0].message.model_dump(), messages[1]],
        max_tokens=4,
    )
    assert again.usage is not None and again.usage.completion_tokens <= 4


def test_async_client_is_served_when_many_ask_at_once(http_server: HttpServer) -> None:
    async def ask() -> list[str]:
        made = openai.AsyncOpenAI(base_url=f"{http_server.url}/v1", api_key="none", max_retries=0)
        async with made as client:

            async def one(seed: int) -> str:
                stream = await client.chat.completions.create(
                    model="tiny",
                    messages=[{"role": "user", "content": "hello"}],
                    max_tokens=10,
                    seed=seed,
                    stream=True,
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return list(await asyncio.gather(*(one(seed % 3) for seed in range(9))))

    texts = asyncio.run(ask())
    assert texts[:3] == texts[3:6] == texts[6:]
    assert len(set(texts)) > 1


def test_prompts_mean_the_same_when_given_as_text_or_token_ids(
    client: openai.OpenAI,
) -> None:
    def texts(prompt: Any) -> list[str]:
        made = client.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0)
        assert [choice.index for choice in made.choices] == list(range(len(made.choices)))
        return [choice.text for choice in made.choices]

    a = byte_token("a")
    assert texts([a, a + 1]) == texts("ab")
    assert texts(["ab", "ba"]) == texts([[a, a + 1], [a + 1, a]]) == texts("ab") + texts("ba")


def test_several_answers_come_when_n_is_given(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> list[str]:
        made = client.completions.create(
            model="tiny", prompt=["x", "y"], n=3, max_tokens=8, seed=5, **more
        )
        return [choice.text for choice in made.choices]

    texts = ask()
    assert len(texts) == 6
    assert len(set(texts)) == 6
    assert texts == ask()
    streamed = [""] * 6
    for chunk in client.completions.create(
        model="tiny", prompt=["x", "y"], n=3, max_tokens=8, seed=5, stream=True
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts


def test_answer_ends_before_a_stop_string(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> Any:
        return client.completions.create(
            model="tiny", prompt="q", max_tokens=60, seed=2, temperature=1.2, **more
        ).choices[0]

    plain = ask().text
    stop = next(c for c in plain[5:] if c.isascii() and c.isprintable())
    for given in (stop, [stop, "never this"]):
        ended = ask(stop=given)
        assert ended.text == plain[: plain.index(stop)]
        assert ended.finish_reason == "stop"


def test_logprobs_are_told_when_asked_for(client: openai.OpenAI) -> None:
    text = client.completions.create(
        model="tiny", prompt="q", max_tokens=6, seed=2, logprobs=3, extra_body={"ignore_eos": True}
    )
    scores = text.choices[0].logprobs
    assert scores is not None and scores.token_logprobs is not None
    assert len(scores.token_logprobs) == len(scores.tokens or ()) == 6
    assert all(score <= 0 for score in scores.token_logprobs)
    assert all(len(top) <= 4 for top in scores.top_logprobs or ())
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    settings: dict[str, Any] = {"logprobs": True, "top_logprobs": 2, "temperature": 0}
    chat = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=6, seed=2, **settings
    )
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content or []
    for one in content:
        assert [top.logprob for top in one.top_logprobs] == sorted(
            (top.logprob for top in one.top_logprobs), reverse=True
        )
        assert one.logprob == pytest.approx(one.top_logprobs[0].logprob)  # it is greedy
    streamed = [
        one
        for chunk in client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=6, seed=2, stream=True, **settings
        )
        if chunk.choices[0].logprobs is not None
        for one in chunk.choices[0].logprobs.content or ()
    ]
    assert [one.to_dict() for one in streamed] == [one.to_dict() for one in content]


def test_bytes_of_tokens_are_their_own_when_they_are_part_of_a_character(
    client: openai.OpenAI,
) -> None:
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    chat = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=60, seed=2, logprobs=True, top_logprobs=1
    )
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content or []
    # Each token of this model is one byte.
    told = [one.bytes or [] for one in content if one.token != "<eos>"]
    assert {len(one) for one in told} == {1}
    assert any(one[0] >= 0x80 for one in told)


def test_models_are_listed_and_found_by_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="ask for 'tiny'"):
        client.models.retrieve("other")


# -- speculation ----------------------------------------------------------------------------------


def test_nothing_is_drafted_when_a_request_opts_out(http_server: HttpServer) -> None:
    body = {"prompt": REPEATED * 2, "max_tokens": 120, "temperature": 0, "ignore_eos": True}
    drafted = http_server.complete(**body)
    usage = drafted["usage"]
    assert usage["num_draft_tokens"] >= usage["num_accepted_tokens"] > 0
    details = usage["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] == usage["num_accepted_tokens"]
    assert sum(details.values()) == usage["num_draft_tokens"]

    before = settled(http_server)["vllm:spec_decode_num_draft_tokens_total"]
    by_body = http_server.complete(**body, speculation={"enabled": False})
    by_length = http_server.complete(**body, speculation={"max_length": 0})
    by_header = http_server.post("/v1/completions", body, x_smartspec_enabled="off").body
    assert settled(http_server)["vllm:spec_decode_num_draft_tokens_total"] == before
    for plain in (by_body, by_length, by_header):
        assert plain["usage"]["num_draft_tokens"] == 0
        assert plain["choices"][0]["text"] == drafted["choices"][0]["text"]
    first = http_server.post(
        "/v1/completions",
        body | {"speculation": {"enabled": True, "weight": 2.0, "token_time_target_s": 0.05}},
        x_smartspec_enabled="off",
    ).body
    assert first["usage"]["num_draft_tokens"] > 0, "the body comes before the header"


@pytest.mark.parametrize(("target_s", "met"), [(1000.0, True), (1e-6, False)])
def test_usage_tells_whether_a_target_was_met(
    http_server: HttpServer, client: openai.OpenAI, target_s: float, met: bool
) -> None:
    body = {"prompt": "q", "max_tokens": 12, "n": 2, "seed": 1, "ignore_eos": True}
    whole = http_server.complete(**body, speculation={"token_time_target_s": target_s})
    by_header = http_server.post(
        "/v1/completions", body, x_smartspec_token_time_target_s=str(target_s)
    ).body
    *chunks, last = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "q"}],
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        extra_body={"ignore_eos": True, "speculation": {"token_time_target_s": target_s}},
    )
    assert last.usage is not None and chunks[1].usage is not None
    streamed = last.usage.to_dict()
    for usage in (whole["usage"], by_header["usage"], streamed):
        told: Any = usage["token_time"]
        assert (told["target_s"], told["met"]) == (target_s, met)
        assert 1e-6 < told["measured_s"] < 1000
    # Until an answer is complete nobody knows.
    early: Any = chunks[1].usage.to_dict()["token_time"]
    assert early == {"target_s": target_s, "measured_s": None, "met": None}


def test_usage_tells_of_no_target_when_there_is_none_or_nothing_to_measure(
    http_server: HttpServer,
) -> None:
    plain = http_server.complete(prompt="q", max_tokens=4)
    assert plain["usage"]["token_time"] is None
    single = http_server.complete(
        prompt="q", max_tokens=1, speculation={"token_time_target_s": 1e-6}
    )
    assert single["usage"]["token_time"] == {"target_s": 1e-6, "measured_s": None, "met": None}


@pytest.mark.parametrize(
    ("headers", "part"),
    [
        ({"x_smartspec_enabled": "perhaps"}, "x-smartspec-enabled"),
        ({"x_smartspec_max_length": "-1"}, "x-smartspec-max-length"),
        ({"x_smartspec_weight": "0"}, "x-smartspec-weight"),
        ({"x_smartspec_token_time_target_s": "nan"}, "x-smartspec-token-time-target-s"),
        ({"x_smartspec_speed": "9"}, "unknown headers: x-smartspec-speed"),
    ],
)
def test_header_is_refused_by_name_when_it_is_bad(
    http_server: HttpServer, headers: dict[str, str], part: str
) -> None:
    refused = http_server.post("/v1/completions", {"prompt": "a"}, **headers)
    assert refused.status == 400
    assert part in refused.error["message"]


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "part"),
    [
        ({"prompt": "a", "zeal": 1, "top_q": 2}, "top_q", "unknown parameters: top_q, zeal"),
        ({"prompt": "a", "frequency_penalty": 0.5}, "frequency_penalty", "or send 0"),
        ({"prompt": "a", "echo": True}, "echo", "or send false"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"prompt": "a", "max_tokens": 5, "max_completion_tokens": 6}, None, "send one of them"),
        ({"prompt": "a", "temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"prompt": "a", "max_tokens": 256}, "prompt", "the model's 256 tokens"),
        ({"prompt": [5, 257]}, "prompt", "vocabulary's size 257"),
        ({"prompt": [5, "a"]}, "prompt", "valid"),
        ({"prompt": ""}, "prompt", "no token"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({}, "prompt", "field required"),
        ({"prompt": "a", "model": "gpt"}, "model", "ask for 'tiny'"),
        ({"prompt": "a", "stream_options": {}}, None, "goes with stream: true"),
        ({"prompt": "a", "stop": "\ud800"}, "stop", "unicode"),
        ({"prompt": "\ud800"}, "prompt", "refuses this"),
        ({"prompt": "a", "speculation": {"length": 1}}, "speculation.length", "unknown"),
        (b"{", None, "not valid JSON"),
        (b"[]", None, "not a JSON object"),
    ],
)
def test_body_is_refused_with_what_to_change_when_it_is_bad(
    http_server: HttpServer, body: Any, param: str | None, part: str
) -> None:
    refused = http_server.post("/v1/completions", body)
    assert refused.status in (400, 404)
    assert refused.error["type"] == "invalid_request_error"
    assert part in refused.error["message"]
    assert refused.error["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]},
        {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2},
        {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json"}},
    ],
)
def test_chat_is_refused_when_the_engine_cannot_do_it(
    http_server: HttpServer, body: dict[str, Any]
) -> None:
    refused = http_server.post("/v1/chat/completions", body)
    assert refused.status == 400
    assert refused.error["message"]


def test_parameters_that_change_nothing_are_taken(http_server: HttpServer) -> None:
    body = {"prompt": "a", "max_tokens": 5, "seed": 1}
    ignored = {"user": "me", "store": True, "metadata": {"a": 1}, "service_tier": "auto"}
    neutral = {"best_of": 1, "repetition_penalty": 1.0, "logit_bias": {}, "suffix": None}
    plain, full = (
        http_server.complete(**body, **more) for more in ({}, {**ignored, **neutral, "stop": None})
    )
    assert plain["choices"] == full["choices"]


def test_unknown_paths_and_methods_are_refused_in_the_same_shape(http_server: HttpServer) -> None:
    assert "no /v2 here" in http_server.get("/v2").error["message"]
    refused = http_server.get("/v1/completions")
    assert refused.status == 405
    assert refused.headers["allow"] == "POST"
    assert "does not take GET" in refused.error["message"]


# -- leaving, and load ----------------------------------------------------------------------------


def test_place_is_free_at_once_when_the_client_leaves(http_server: HttpServer) -> None:
    before = settled(http_server)
    body = {"prompt": "a", "max_tokens": 250, "ignore_eos": True, "temperature": 0}
    asyncio.run(stream_text(http_server.port, body, leave_after=2))
    after = settled(http_server)
    assert after["smartspec_http_disconnects_total"] == (
        before["smartspec_http_disconnects_total"] + 1
    )
    aborted = 'vllm:request_success_total{finished_reason="abort"}'
    assert after[aborted] == before[aborted] + 1
    assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] < 250


def test_place_is_free_at_once_when_the_client_of_a_whole_answer_leaves(
    http_server: HttpServer,
) -> None:
    before = settled(http_server)
    data = b'{"prompt": "a", "max_tokens": 250, "ignore_eos": true}'
    with socket.create_connection(("127.0.0.1", http_server.port)) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(data), data)
        )
        until(lambda: http_server.metrics()["smartspec_http_requests_in_flight"] > 0)
    after = settled(http_server)
    assert after["smartspec_http_disconnects_total"] == (
        before["smartspec_http_disconnects_total"] + 1
    )


def test_nothing_leaks_when_a_third_of_200_streams_leave(http_server: HttpServer) -> None:
    """Places, KV room and tasks come back; those who stay read what they would read alone."""
    rng = random.Random(0)
    bodies = [
        {
            "prompt": REPEATED[: rng.randint(3, 29)],
            "max_tokens": 30,
            "seed": seed,
            "temperature": rng.choice([0.0, 0.8]),
            "ignore_eos": True,
        }
        for seed in range(200)
    ]
    leavers = {i: rng.randint(0, 8) for i in rng.sample(range(200), 67)}
    before = settled(http_server)

    async def all_at_once() -> list[str]:
        return await asyncio.gather(
            *(stream_text(http_server.port, body, leavers.get(i)) for i, body in enumerate(bodies))
        )

    crowded = asyncio.run(all_at_once())
    after = settled(http_server)
    until(lambda: http_server.metrics()["smartspec_http_tasks"] <= before["smartspec_http_tasks"])
    assert after["vllm:kv_cache_usage_perc"] == before["vllm:kv_cache_usage_perc"] == 0
    assert after["process_open_fds"] <= before["process_open_fds"] + 2  # kept alive: our scrapes
    left = after["smartspec_http_disconnects_total"] - before["smartspec_http_disconnects_total"]
    assert left > 0
    for i, body in enumerate(bodies):
        if i not in leavers:
            assert crowded[i] == http_server.complete(**body)["choices"][0]["text"], body


# -- servers of their own -------------------------------------------------------------------------


@pytest.fixture
def own_server(tiny_model_dir: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    started: list[HttpServer] = []

    def start(*options: str, env: dict[str, str] | None = None) -> HttpServer:
        started.append(HttpServer(tiny_model_dir, tmp_path / "server.log", *options, env=env))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.mark.slow
def test_bounds_hold_and_running_answers_finish_when_told_to_stop(own_server: Any) -> None:
    """One server, slowly: full, too large, too slow, without a key, and then SIGTERM."""
    server = own_server(
        "--max-num-running", "1", "--max-num-waiting", "1", "--max-body-bytes", "2000",
        "--max-model-len", "512", "--length", "0", "--max-num-connections", "8",
        env={"SMARTSPEC_API_KEY": "open sesame"},
    )  # fmt: skip
    starting = server.get("/health/ready")
    assert starting.status in (200, 503)
    assert server.get("/health/live").status == 200
    server.wait_ready()

    refused = server.post("/v1/completions", {"prompt": "a"})
    assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
    assert server.get("/v1/models", authorization="Bearer open").status == 401
    key = {"authorization": "Bearer open sesame"}
    assert server.get("/v1/models", **key).status == 200
    assert "open sesame" not in " ".join(server.decode_process.environ().values())
    large = server.post("/v1/completions", {"prompt": "a" * 3000}, **key)
    assert (large.status, large.error["code"]) == (413, "body_too_large")
    never = server.post("/v1/completions", {"prompt": "a", "n": 3}, **key)
    assert (never.status, never.error["code"]) == (400, "too_many_choices")

    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(8)]
    until(lambda: server.get("/v1/models", **key).status == 503)
    crowded = server.get("/v1/models", **key)
    assert (crowded.status, crowded.error["code"]) == (503, "too_many_connections")
    assert server.get("/health/ready").status == 200
    assert int(crowded.headers["retry-after"]) >= 1
    for sock in idle:
        sock.close()
    until(lambda: server.get("/v1/models", **key).status == 200)

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="open sesame", max_retries=0) as client:
        body: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 500, "seed": 1}
        extra = {"extra_body": {"ignore_eos": True}}
        streams = [client.completions.create(**body, **extra, stream=True) for _ in range(2)]
        with pytest.raises(openai.RateLimitError, match="2 of 2 places") as full:
            client.completions.create(**body)
        assert int(full.value.response.headers["retry-after"]) >= 1

        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.get("/health/ready").status == 503)
        assert server.get("/health/live").status == 200
        late = server.post("/v1/completions", {"prompt": "a"}, **key)
        assert (late.status, late.error["code"]) == (503, "shutting_down")
        texts = ["".join(chunk.choices[0].text for chunk in stream) for stream in streams]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 300
    assert server.process.wait(30) == 0
    assert "stopped" in server.log.read_text()


@pytest.mark.slow
def test_clients_are_told_when_time_is_up_and_when_the_decode_process_dies(own_server: Any) -> None:
    server = own_server(
        "--request-timeout-s", "1", "--max-model-len", "512", "--length", "0"
    ).wait_ready()  # fmt: skip
    body = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "n": 64}
    late = server.post("/v1/completions", body)
    assert (late.status, late.error["code"]) == (504, "request_timeout")
    streamed = server.post("/v1/completions", body | {"stream": True})
    assert streamed.status == 200
    assert '"code": "request_timeout"' in streamed.body
    assert streamed.body.endswith("data: [DONE]\n\n")
    settled(server)

    child = server.decode_process
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(
            model="tiny", prompt="a", max_tokens=500, stream=True, extra_body={"ignore_eos": True}
        )
        child.suspend()  # or it could be done before it dies
        child.kill()
        with pytest.raises(openai.APIError, match="decode process has ended") as lost:
            for _ in stream:
                pass
        assert lost.value.code == "engine_dead"
    assert server.process.wait(30) == 1
    assert "the decode process ended with status -9" in server.log.read_text()


def test_decode_process_goes_too_when_the_server_is_killed(own_server: Any) -> None:
    server = own_server()
    until(lambda: psutil.Process(server.process.pid).children())
    child = server.decode_process
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    until(lambda: not child.is_running() or child.status() == "zombie")


def test_exit_status_says_so_when_the_model_cannot_be_loaded(
    tmp_path: Path, own_server: Any
) -> None:
    server = own_server("--model", str(tmp_path / "nothing"))
    assert server.process.wait(60) == 2
    assert "cannot load" in server.log.read_text()
