"""First turns of Spec-Bench (Xia et al. 2024), as recordings use them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from smartspec.lab.public_data import data_folder

TASKS = ("chat", "translation", "summarization", "qa", "math_reasoning", "rag")
FILE = Path("prompts", "spec_bench_question.jsonl")


class Prompt(NamedTuple):
    """A first turn."""

    question_id: int
    task: str  #: one of `TASKS`; the eight kinds of multi-turn chat count as one
    text: str


class DataNotAvailable(RuntimeError):
    """The recorded data is not on this machine."""


def prompts() -> list[Prompt]:
    """All 480, task after task in turn, every second of each task before the others.

    So the beginning of a recording that was cut short is balanced. Raises `DataNotAvailable`.
    """
    by_task: dict[str, list[Prompt]] = {task: [] for task in TASKS}
    path = data_folder() / FILE
    if not path.is_file():
        raise DataNotAvailable(f"no {path}: point SMARTSPEC_DATA at the data's folder")
    for line in path.read_text().splitlines():
        question = json.loads(line)
        task = question["category"] if question["category"] in TASKS else "chat"
        by_task[task].append(Prompt(question["question_id"], task, question["turns"][0]))
    size = max(len(found) for found in by_task.values())
    order = [*range(0, size, 2), *range(1, size, 2)]
    return [found[i] for i in order for found in by_task.values() if i < len(found)]
