"""What serving over HTTP adds to a decode step: 64 streams over HTTP, and the same batch without.

Both arms decode the same 64 prompts greedily, without speculation, so that every step brings each
stream one token. *In process*: the worker's loop in this process, from the end of a step to the end
of the next. *HTTP*: `smartspec worker --http`, the time between two tokens of a stream as a client
in this process reads them. Only the time in which all 64 decode counts. The arms take turns, and
the ratio is of pairs (paired.py).

The decode loop gets one thread in both arms: the other core of a small machine is for the HTTP
process and the client, which a real server would not have beside it.

Run: python benchmarks/bench_http.py [--repetitions 12] [--tokens 14]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from figures import record
from paired import paired_ratio

from smartspec.engine_adapter.reference import model as models
from smartspec.engine_adapter.reference.sequence import Request
from smartspec.engine_adapter.reference.worker import Worker

NUM_STREAMS = 64
MAX_MODEL_LEN = 128
MAX_PREFILL_TOKENS = 1024
START_TIMEOUT_S = 120.0
PROMPTS = [f"Entry {i} of the ship's log: today the wind" for i in range(NUM_STREAMS)]


def in_process(worker: Worker, target: models.LoadedModel, num_tokens: int) -> float:
    """Median seconds of a step with all requests decoding."""
    for prompt in PROMPTS:
        tokens = target.tokenizer(prompt)["input_ids"]
        worker.add_request(Request(tokens, num_tokens, ignore_eos=True))
    taken, ended = [], time.perf_counter()
    while worker.has_work:
        facts = worker.step().facts
        began, ended = ended, time.perf_counter()
        if facts and facts.batch.size == NUM_STREAMS and not facts.batch.num_prefill_tokens:
            taken.append(ended - began)
    return float(np.median(taken[1:]))


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


async def _stream(port: int, prompt: str, num_tokens: int) -> list[float]:
    """When each event of a stream was read."""
    body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    return [time.perf_counter() async for _ in events(port, "/v1/completions", body)]


async def over_http(port: int, num_tokens: int) -> float:
    """Median seconds between two tokens of a stream while all streams decode."""
    streams = await asyncio.gather(*(_stream(port, p, num_tokens) for p in PROMPTS))
    begin = max(times[0] for times in streams)
    end = min(times[-1] for times in streams)
    gaps = [
        b - a
        for times in streams
        for a, b in zip(times, times[1:], strict=False)
        if begin <= a and b <= end
    ]
    return float(np.median(gaps))


@contextmanager
def served() -> Iterator[int]:
    """The server's port."""
    with TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        command = [sys.executable, "-m", "smartspec.daemon.cli", "worker", "--http", "127.0.0.1:0"]
        command += ["--proposer", "none", "--speculation", "own", "--threads", "1"]
        command += ["--max-num-running", str(NUM_STREAMS), "--max-model-len", str(MAX_MODEL_LEN)]
        command += ["--max-prefill-tokens", str(MAX_PREFILL_TOKENS)]
        with log.open("wb") as sink:
            process = subprocess.Popen(command, stderr=sink)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while "ready:" not in log.read_text():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the server does not start:\n{log.read_text()}")
                time.sleep(0.2)
            found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", log.read_text())
            assert found is not None
            yield int(found[1])
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def main() -> None:
    """Measure, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=14, help="per stream")
    args = parser.parse_args()
    torch.set_num_threads(1)
    target = models.load()
    # One for all repetitions, as the server has: a new one's cache is cold memory.
    worker = Worker(
        target.model,
        target.tokenizer,
        max_num_running=NUM_STREAMS,
        max_model_len=MAX_MODEL_LEN,
        max_prefill_tokens=MAX_PREFILL_TOKENS,
    )
    http: list[float] = []
    plain: list[float] = []
    with served() as port:
        for repetition in range(-1, args.repetitions):
            arms = [
                lambda: http.append(asyncio.run(over_http(port, args.tokens))),
                lambda: plain.append(in_process(worker, target, args.tokens)),
            ]
            for arm in arms if repetition % 2 else reversed(arms):
                arm()
            if repetition < 0:  # both arms warm up
                http.clear()
                plain.clear()
            else:
                print(f"{plain[-1] * 1e3:8.1f} ms in process {http[-1] * 1e3:8.1f} ms over HTTP")
    ratio = paired_ratio(http, plain)
    ratios = np.array(http) / np.array(plain)
    record(
        "http",
        {
            "http_step_overhead_pct": (ratio.value - 1) * 100,
            "http_step_overhead_upper95_pct": (ratio.upper95 - 1) * 100,
            "http_step_overhead_lowest_pct": (float(ratios.min()) - 1) * 100,
            "http_step_overhead_highest_pct": (float(ratios.max()) - 1) * 100,
            "http_step_p50_ms": float(np.median(http)) * 1e3,
            "in_process_step_p50_ms": float(np.median(plain)) * 1e3,
            "num_streams": NUM_STREAMS,
            "num_repetitions": args.repetitions,
        },
    )


if __name__ == "__main__":
    main()
