"""The text of benchmarks/bench_accelerator.py: who says what, how often drafts are right."""

from __future__ import annotations

import pytest
import torch
from bench_accelerator import ACCURACY, Script

NUM_WORDS = 512


def text(first: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that the target says after ``first``, and their positions."""
    script, tokens = Script(NUM_WORDS, size), [first]
    for position in range(size - 1):
        said = script.following(torch.tensor(tokens[-1:]), torch.tensor([position]))
        tokens.append(int(said))
    return torch.tensor(tokens), torch.arange(size)


@pytest.mark.parametrize("kind", range(len(ACCURACY)))
def test_drafts_of_a_class_are_right_as_often_as_it_has_it_and_as_sure(kind: int) -> None:
    tokens, positions = text(40 + kind, 4000)
    script = Script(NUM_WORDS, len(tokens))
    assert (tokens % len(ACCURACY) == kind).all() and int(tokens.max()) < NUM_WORDS
    said, sure = script.drafted(tokens, positions)
    right = said == script.following(tokens, positions)
    assert float(right.float().mean()) == pytest.approx(ACCURACY[kind], abs=0.03)
    for some in (sure > ACCURACY[kind], sure < ACCURACY[kind]):
        assert 0.4 < float(some.float().mean()) < 0.6
        assert float(right[some].float().mean()) == pytest.approx(
            float(sure[some].mean()), abs=0.04
        )
