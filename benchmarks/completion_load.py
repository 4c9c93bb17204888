"""Load for a server that speaks OpenAI's HTTP: arrivals at given times, or so many at a time.

A small client of our own: vLLM's `bench serve` imports vLLM for every run, some ten seconds of
the core that it would share with what is measured. Answers are streamed; all times are of this
process' clock, and a request's latency counts from when it was due, whenever it was sent.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from smartspec.lab.demo.schedule import Prompt, mixed


class Answered(NamedTuple):
    """A request that was answered; seconds from the start of the play."""

    id: str
    due_s: float
    first_s: float
    end_s: float
    num_tokens: int
    text: str

    @property
    def latency_s(self) -> float:
        return self.end_s - self.due_s


class Stretch(NamedTuple):
    """Seconds of arrivals at one rate, per second."""

    seconds: float
    rate: float


class Arrival(NamedTuple):
    """A prompt, due so many seconds after the start."""

    due_s: float
    prompt: Prompt


def arrivals(prompts: Sequence[Prompt], stretches: Sequence[Stretch], seed: int) -> list[Arrival]:
    """Poisson arrivals given their number in each stretch, the same for every seed.

    All prompts come in a mixed order, then again in another.
    """
    rng = np.random.default_rng(seed)
    order: list[Prompt] = []
    due: list[Arrival] = []
    begin_s = 0.0
    for stretch in stretches:
        count = max(1, round(stretch.seconds * stretch.rate))
        for at_s in np.sort(rng.uniform(begin_s, begin_s + stretch.seconds, count)).tolist():
            order = order or mixed(prompts, rng)
            due.append(Arrival(at_s, order.pop()))
        begin_s += stretch.seconds
    return due


async def events(port: int, path: str, body: dict[str, Any]) -> AsyncIterator[bytes]:
    """Data of each event of a streamed answer, as soon as it is read."""
    data = json.dumps({**body, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST %s HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%s" % (path.encode(), len(data), data)
    )
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            yield line[6:]
        elif line.startswith(b"data: [DONE]"):
            break
    writer.close()


async def ask(port: int, prompt: Prompt, due_s: float, began: float) -> Answered:
    """Stream one greedy answer."""
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": prompt.prompt}],
        "max_tokens": prompt.max_tokens,
        "temperature": 0,
        "stream_options": {"include_usage": True},
    }
    first_s = end_s = float("nan")
    num_tokens, text = 0, ""
    async for data in events(port, "/v1/chat/completions", body):
        event: dict[str, Any] = json.loads(data)
        if event.get("usage"):
            num_tokens = event["usage"]["completion_tokens"]
        for choice in event.get("choices", ()):
            if piece := choice["delta"].get("content"):
                end_s = time.perf_counter() - began
                first_s = end_s if not text else first_s
                text += piece
            if choice["finish_reason"]:
                end_s = time.perf_counter() - began
    if not num_tokens:
        raise RuntimeError(f"request {prompt.id} was not answered")
    return Answered(prompt.id, due_s, first_s, end_s, num_tokens, text)


async def _play(port: int, due: Sequence[Arrival]) -> list[Answered]:
    began = time.perf_counter()
    tasks = []
    for arrival in due:
        await asyncio.sleep(max(0.0, arrival.due_s - (time.perf_counter() - began)))
        tasks.append(asyncio.create_task(ask(port, arrival.prompt, arrival.due_s, began)))
    return list(await asyncio.gather(*tasks))


def play(port: int, due: Sequence[Arrival]) -> list[Answered]:
    """Send each request when it is due, whatever the server does; return when all are answered."""
    return asyncio.run(_play(port, due))


async def _keep_busy(
    port: int, prompts: Sequence[Prompt], at_once: int, seconds: float
) -> list[Answered]:
    began = time.perf_counter()
    waiting = list(reversed(prompts))
    done: list[Answered] = []

    async def client() -> None:
        while waiting and (now_s := time.perf_counter() - began) < seconds:
            done.append(await ask(port, waiting.pop(), now_s, began))

    await asyncio.gather(*(client() for _ in range(at_once)))
    return done


def keep_busy(port: int, prompts: Sequence[Prompt], at_once: int, seconds: float) -> list[Answered]:
    """Always ``at_once`` requests, until time or prompts are over."""
    return asyncio.run(_keep_busy(port, prompts, at_once, seconds))
