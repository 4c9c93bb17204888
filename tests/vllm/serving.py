"""Runs serve.py with vLLM's Python, which has an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
PYTHON = "SMARTSPEC_VLLM_PYTHON"


def vllm_python() -> str:
    """The Python that runs vLLM; skips the test where there is none."""
    python = os.environ.get(PYTHON)
    if not python:
        pytest.skip(f"set {PYTHON} to the Python of an environment with vLLM, or `make test-vllm`")
    return python


def command(*arguments: object) -> list[str]:
    return [vllm_python(), str(HERE / "serve.py"), *map(str, arguments)]


def served(out: Path, *arguments: object, **environment: str) -> dict[str, Any]:
    """What an engine did that played all requests to their end."""
    method, source, *more = arguments
    log = out.with_suffix(".log")
    with log.open("wb") as sink:
        done = subprocess.run(
            command(method, source, out, *more),
            stdout=sink,
            stderr=sink,
            env={**os.environ, **environment},
        )
    assert done.returncode == 0, log.read_text("utf-8", "replace")[-4000:]
    told: dict[str, Any] = json.loads(out.read_text("utf-8"))
    return told


def assert_same(plain: dict[str, Any], other: dict[str, Any]) -> None:
    """Every answer of ``other`` is that of no speculation, as far as an abort let it come."""
    from serve import is_aborted

    for name, [answer] in other["answers"].items():
        number, _ = name.split(".")
        [expected] = plain["answers"][f"{number}.0"]
        if is_aborted(int(number)):
            shorter = min(len(answer), len(expected))
            assert shorter > 0
            answer, expected = answer[:shorter], expected[:shorter]
        assert answer == expected, name
    for name, steps in other["logprobs"].items():
        number, _ = name.split(".")
        for ours, theirs in zip(steps, plain["logprobs"][f"{number}.0"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-3), name
