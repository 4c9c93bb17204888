"""The reference worker's HTTP server as a real process, and a client that can leave at any time."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

START_TIMEOUT_S = 90.0  #: two processes load torch, on a machine that may be busy
STOP_TIMEOUT_S = 60.0


@dataclass
class Answer:
    """An HTTP response."""

    status: int
    headers: dict[str, str]
    body: Any  #: from JSON where it is JSON, else text

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.body["error"]
        return found


class HttpServer:
    """`smartspec worker --http` on a free port, with a model directory.

    Parameters
    ----------
    model : directory
    log : file of its standard error
    options : further ones of the command
    env : on top of our environment
    """

    def __init__(
        self, model: Path, log: Path, *options: str, env: dict[str, str] | None = None
    ) -> None:
        self.log = log
        command = [sys.executable, "-m", "smartspec.daemon.cli", "worker"]
        command += ["--http", "127.0.0.1:0", "--model", str(model), "--served-model-name", "tiny"]
        command += ["--dtype", "float64", "--speculation", "own", "--threads", "1"]
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                [*command, *options],
                stderr=sink,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
                start_new_session=True,
            )
        _wait(lambda: self._find_port() or self.process.poll() is not None)
        self.port = self._find_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def _find_port(self) -> int:
        found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", self.log.read_text())
        return int(found[1]) if found else 0

    def wait_ready(self) -> HttpServer:
        _wait(lambda: self.get("/health/ready").status == 200 or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()
        return self

    def get(self, path: str, **headers: str) -> Answer:
        return self._ask(urllib.request.Request(self.url + path, headers=_named(headers)))

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {"content-type": "application/json"} | _named(headers)
        return self._ask(urllib.request.Request(self.url + path, data, named))

    def complete(self, **body: Any) -> Any:
        """The answer of /v1/completions, which must be good."""
        answer = self.post("/v1/completions", body)
        assert answer.status == 200, answer
        return answer.body

    @staticmethod
    def _ask(request: urllib.request.Request) -> Answer:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return _answer(response.status, response.headers, response.read())
        except urllib.error.HTTPError as refusal:
            with refusal:
                return _answer(refusal.code, refusal.headers, refusal.read())
        except urllib.error.URLError as error:
            return Answer(0, {}, str(error))

    def metrics(self) -> dict[str, float]:
        """Values by name; those with labels other than model and engine with these labels."""
        values = {}
        for line in self.get("/metrics").body.splitlines():
            if line.startswith("#") or not line:
                continue
            series, _, value = line.rpartition(" ")
            series = re.sub(r'engine="0",|,?model_name="[^"]*"', "", series)
            values[series.removesuffix("{}")] = float(value)
        return values

    @property
    def decode_process(self) -> psutil.Process:
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def stop(self) -> int:
        """SIGTERM; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def _wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "the server does not start"
        time.sleep(0.05)


def _named(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


def _answer(status: int, headers: Any, raw: bytes) -> Answer:
    named = {name.lower(): value for name, value in headers.items()}
    is_json = named.get("content-type", "").startswith("application/json")
    return Answer(status, named, json.loads(raw) if is_json else raw.decode())


async def stream_text(port: int, body: dict[str, Any], leave_after: int | None = None) -> str:
    """The text of a streamed completion; hangs up after ``leave_after`` events, where given.

    A socket of its own, written and read by hand: clients pool connections and read ahead.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = json.dumps(body | {"stream": True}).encode()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(data), data)
        )
        text, num_events = "", 0
        if leave_after == 0:
            await writer.drain()
            return ""
        assert b"200" in await reader.readline()
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                return text
            event = json.loads(line.removeprefix(b"data: "))
            assert "error" not in event, event
            text += "".join(choice["text"] for choice in event["choices"])
            num_events += 1
            if num_events == leave_after:
                return text
        raise AssertionError("the stream ended without [DONE]")
    finally:
        writer.transport.abort()
        # Its transport is closed in the loop's next turn.
        await asyncio.sleep(0)
