"""What benchmarks/bench_vllm_accelerator.py makes of its rows, and who decides lengths in it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes import decode_batch
from vllm_accelerator_figures import places, read, summary
from vllm_arms import Source

from smartspec.engine_adapter.lengths import Choice

KEPT = Path(__file__).parents[2] / "benchmarks" / "data" / "vllm_accelerator.jsonl"


def turn(arm: str, number: int, seconds: float, tokens: int = 100) -> dict[str, Any]:
    return {
        "batch": 8,
        "acceptance": 0.8,
        "round": number,
        "arm": arm,
        "s": seconds,
        "steps": 10,
        "tokens": tokens,
        "to_draft": 20,
        "step_ms": 100 * seconds,
        "own_us": 70.0,
        "meanwhile_us": 400.0,
    }


def test_rounds_count_that_all_arms_were_in() -> None:
    rows = [turn("smartspec", -1, 9.0), *(turn(arm, n, 1.0) for n in (0, 1) for arm in "01")]
    rows.append(turn("0", 2, 1.0))
    [(name, arms)] = places(rows)
    assert name == "batch_8_accept_80"
    assert {arm: [row["round"] for row in arms[arm]] for arm in arms} == {"0": [0, 1], "1": [0, 1]}


def test_smartspec_is_compared_by_turns_with_the_best_static_length() -> None:
    rows = []
    for number, pace in enumerate((1.0, 1.6)):
        for arm, seconds in (("0", 1.5), ("1", 1.0), ("smartspec", 1.1)):
            rows.append(turn(arm, number, pace * seconds))
    figures = summary({"turns": rows})
    place = "turns_batch_8_accept_80"
    assert figures[f"{place}_best_static"] == 1
    assert figures[f"{place}_mean_to_draft"] == 2
    assert figures[f"{place}_smartspec_over_best_static"] == pytest.approx(1.1)
    assert figures[f"{place}_smartspec_over_best_static_upper95"] == pytest.approx(1.1)
    assert figures[f"{place}_smartspec_over_length_0"] == pytest.approx(1.1 / 1.5)


def test_overhead_is_of_steps_and_not_of_tokens() -> None:
    rows = [turn("off_3", 0, 1.0, tokens=90), turn("shadow_3", 0, 1.05, tokens=70)]
    figures = summary({"overhead": rows})
    assert figures["overhead_batch_8_accept_80_step_with_over_without"] == pytest.approx(1.05)


def test_answers_are_those_of_no_speculation_or_not() -> None:
    plain = {"arm": "none", "answers": [[1], [2]], "drafted": 0, "accepted": 0}
    arm = {"arm": "5", "answers": [[1], [3]], "drafted": 9, "accepted": 4, "ours": [9, 4, 2]}
    figures = summary({"answers_none": [plain], "answers_ngram": [{"end": {}}, arm]})
    assert (figures["answers_ngram_5_same"], figures["answers_ngram_5_of"]) == (1, 2)
    assert figures["answers_ngram_5_counted_accepted"] == figures["answers_ngram_5_accepted"] == 4


def test_kept_rows_are_of_whole_rounds_and_of_the_same_answers() -> None:
    found = read(KEPT)
    assert all(len(rows) == 6 for _, arms in places(found["turns"]) for rows in arms.values())
    same = [value for name, value in summary(found).items() if name.endswith("_same")]
    assert same == [64] * 7


class Link:
    """Asks for length 4, and notes what it is asked."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def choose(self, batch: Any) -> Choice:
        return Choice.fixed(np.full(batch.size, 4), "policy")

    def prepare(self, batch: Any, features: Any) -> None:
        self.told.append("prepare")

    def ready(self) -> Any:
        self.told.append("ready")
        return SimpleNamespace(lengths=4)

    def report(self, facts: Any) -> None:
        self.told.append("report")


@pytest.mark.parametrize(
    ("arm", "length", "steers", "asks", "source"),
    [
        ("smartspec", 4, True, True, "policy"),
        ("shadow_3", 3, True, True, "policy"),
        ("3", 3, True, False, "policy"),
        ("5", 5, False, False, "own"),
    ],
)
def test_arm_decides_lengths_and_who_is_asked(
    arm: str, length: int, steers: bool, asks: bool, source: str
) -> None:
    link = Link()
    made = Source(link, longest=5)
    made.take(arm)
    batch = decode_batch()
    choice = made.choose(batch)
    assert choice.lengths.tolist() == [length] * 3 and choice.source == source
    assert made.may_steer is steers
    made.prepare(batch)
    made.report(None)
    assert (made.ready() is not None) is (arm == "smartspec")
    assert link.told == (["prepare", "report", "ready"] if asks else [])


def test_random_lengths_are_within_what_each_request_can_have() -> None:
    made = Source(Link(), longest=5)
    made.take("random")
    seen = np.array([made.choose(decode_batch(ceiling=2)).lengths for _ in range(40)])
    assert set(seen.ravel().tolist()) == {0, 1, 2} and made.may_steer
