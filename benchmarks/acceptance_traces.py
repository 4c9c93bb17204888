"""Recorded acceptance: what would have been accepted at every position of every answer.

Made by record_acceptance.py; its head says how and why a position's run tells the outcome of any
length.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from spec_bench import TASKS

FILE = Path(__file__).parent / "data" / "acceptance.npz"
MAX_LENGTH = 8
#: What is chosen on one half is scored on the other.
SPLIT = (("chat", "summarization", "math_reasoning"), ("translation", "qa", "rag"))
U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]


class Answer(NamedTuple):
    """One answer; columns [P] over its tokens after the first, as a step would decode them.

    A step that begins at position p and drafts k <= P - p has min(k, run[p]) drafts accepted, and
    the next begins at p + that + 1.
    """

    question_id: int
    task: str
    temperature: float
    num_prompt: int  #: tokens
    token: npt.NDArray[np.uint16]
    match_length: U8  #: tokens that prompt lookup matched; 0: it has nothing to propose
    match_agreement: F32  #: how far earlier occurrences agree on what comes next (prompt_lookup.py)
    lookup_run: U8  #: copied tokens accepted, 0 to `MAX_LENGTH`
    #: the first copied token that is not accepted; 0 where it is beyond the run or the answer
    lookup_miss: npt.NDArray[np.uint16]
    lookup_second: npt.NDArray[np.uint16]  #: the second token that prompt lookup copies
    draft_run: U8  #: the same of the draft model
    draft_confidence: F32  #: probability that the draft model gives the token it proposes here

    @property
    def size(self) -> int:
        return len(self.token)

    @property
    def ceiling(self) -> U8:
        """Longest drafts whose every outcome was recorded: one token must be left to decode."""
        left = self.size - np.arange(self.size) - 1
        return np.minimum(left, MAX_LENGTH).astype(np.uint8)


def load(path: Path = FILE) -> list[Answer]:
    """All recorded answers, in the order of recording."""
    with np.load(path) as file:
        columns = {name: file[name] for name in file.files}
    ends = np.cumsum(columns["num_positions"].astype(np.int64))[:-1]
    tasks = [TASKS[task] for task in columns["task"]]
    heads = (columns[name].tolist() for name in ("question_id", "temperature", "num_prompt"))
    parts = (np.split(_wide(columns[name]), ends) for name in Answer._fields[4:])
    return [
        Answer(question_id, task, temperature, num_prompt, *rest)
        for task, question_id, temperature, num_prompt, *rest in zip(
            tasks, *heads, *parts, strict=True
        )
    ]


def _wide(column: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Shares are kept in half precision."""
    return column.astype(np.float32) if column.dtype == np.float16 else column
