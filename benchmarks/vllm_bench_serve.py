"""Load from `vllm bench serve`, one process for all of a benchmark's runs.

Run by itself, every `vllm bench serve` imports vLLM first, ten seconds of the core that it shares
with what is measured. Here a process in vLLM's environment imports it once, and then does what is
asked: each run is that command's own code with the arguments of its command line, and several may
begin one after another and overlap, for a schedule of several rates. The tokenizer is read once,
for the same reason.

A run that begins while another is under way is made ready in the loop that this one is timed by:
some tens of milliseconds, which all servers meet alike. Latencies count from when a request was
sent, as that command has them.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # vLLM's environment does without
    from smartspec.lab.demo.schedule import Prompt


class Stretch(NamedTuple):
    """Prompts that begin to arrive so many seconds after the start.

    As a Poisson process of ``rate`` per second, or ``at_once`` at a time where that is given.
    """

    after_s: float
    prompts: Sequence[Prompt]
    rate: float = float("inf")
    at_once: int | None = None
    seed: int = 0


class Answered(NamedTuple):
    """A request that was answered; seconds, from the first request of its play."""

    id: str
    sent_s: float
    first_s: float
    end_s: float
    num_tokens: int
    text: str

    @property
    def latency_s(self) -> float:
        return self.end_s - self.sent_s


class BenchServe:
    """`vllm bench serve`, imported and ready; to be closed.

    Parameters
    ----------
    python : of the environment with vLLM
    model : folder of the model, for its tokenizer
    name : that servers serve it by
    """

    def __init__(self, python: str, model: Path, name: str) -> None:
        self._model, self._name = model, name
        self._folder = tempfile.TemporaryDirectory(prefix="ss-")
        self._log = (Path(self._folder.name) / "log").open("wb")
        self._process = subprocess.Popen(
            [python, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        self._read()  # it is ready

    def _read(self) -> Any:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            words = Path(self._log.name).read_text("utf-8", "replace")[-4000:]
            raise SystemExit(f"vllm bench serve has ended:\n{words}")
        return json.loads(line)

    def arguments(self, port: int, stretch: Stretch, dataset: Path) -> list[str]:
        """A command line for `vllm bench serve`."""
        options = {
            "backend": "openai-chat",
            "endpoint": "/v1/chat/completions",
            "port": port,
            "model": self._model,
            "served-model-name": self._name,
            "dataset-name": "custom",
            "dataset-path": dataset,
            "custom-output-len": -1,  # each prompt's own
            "num-prompts": len(stretch.prompts),
            "request-rate": stretch.rate,
            "temperature": 0,
            "seed": stretch.seed,
            "ready-check-timeout-sec": 0,  # else it sends a request of its own first
        }
        if stretch.at_once is not None:
            options["max-concurrency"] = stretch.at_once
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [*words, "--skip-chat-template", "--disable-shuffle", "--save-detailed"]

    def play(self, port: int, stretches: Sequence[Stretch]) -> list[Answered]:
        """Send all prompts to a server, and return when all are answered."""
        runs = []
        for i, stretch in enumerate(stretches):
            dataset = Path(self._folder.name) / f"{i}.jsonl"
            dataset.write_text(
                "".join(
                    json.dumps({"prompt": one.prompt, "output_tokens": one.max_tokens}) + "\n"
                    for one in stretch.prompts
                )
            )
            runs.append([stretch.after_s, self.arguments(port, stretch, dataset)])
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(runs).encode() + b"\n")
        self._process.stdin.flush()
        results = self._read()
        began = min(min(result["start_times"]) for result in results)
        answers = []
        for stretch, result in zip(stretches, results, strict=True):
            if result["completed"] != len(stretch.prompts):
                raise RuntimeError(f"requests were not answered: {set(result['errors'])}")
            for i, one in enumerate(stretch.prompts):
                sent_s = result["start_times"][i] - began
                first_s = sent_s + result["ttfts"][i]
                end_s = first_s + sum(result["itls"][i])
                num_tokens, text = result["output_lens"][i], result["generated_texts"][i]
                answers.append(Answered(one.id, sent_s, first_s, end_s, num_tokens, text))
        return answers

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()
        self._folder.cleanup()


# -- the process in vLLM's environment ------------------------------------------------------------


def _serve() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what `bench serve` prints goes to the log
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    serve.get_tokenizer = functools.cache(serve.get_tokenizer)
    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)

    async def one(after_s: float, arguments: list[str]) -> dict[str, Any]:
        await asyncio.sleep(after_s)
        result: dict[str, Any] = await serve.main_async(parser.parse_args(arguments))
        return result

    async def all_of(runs: list[tuple[float, list[str]]]) -> list[dict[str, Any]]:
        return await asyncio.gather(*(one(after_s, arguments) for after_s, arguments in runs))

    print("true", file=replies)
    for line in sys.stdin:
        results = asyncio.run(all_of(json.loads(line)))
        print(json.dumps(results, default=float), file=replies)


if __name__ == "__main__":
    _serve()
