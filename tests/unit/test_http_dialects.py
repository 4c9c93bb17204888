"""Scores of tokens that are part of a character: their bytes, and where they are in the text."""

from __future__ import annotations

from smartspec.engine_adapter.reference.http import responses
from smartspec.engine_adapter.reference.http.dialects import ChatDialect, Part, TextDialect
from smartspec.engine_adapter.reference.replies import ScoredToken, Token, TokenLogprob

HALVES = [
    ScoredToken(text, -0.5, [TokenLogprob(text, -0.5, raw)], raw)
    for text, raw in ((" \ufffd", [0x20, 0xC3]), ("\ufffd", [0xA9]), ("t", None), ("\ufffd", None))
]
USAGE = responses.Usage(
    prompt_tokens=1, completion_tokens=4, total_tokens=5, num_draft_tokens=0,
    num_accepted_tokens=0, token_time=None,
    completion_tokens_details=responses.CompletionTokensDetails(
        accepted_prediction_tokens=0, rejected_prediction_tokens=0
    ),
)  # fmt: skip


def part_of(scored: list[ScoredToken], begin: int = 0) -> Part:
    part = Part(begin)
    part.add(Token("a", " ét\ufffd", 4, 0.0, scored))
    return part


def test_bytes_are_the_tokens_own_when_it_is_part_of_a_character() -> None:
    answer = ChatDialect("a", "tiny", scored=True).whole([part_of(HALVES)], USAGE)
    assert isinstance(answer, responses.ChatCompletion)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert [one.bytes for one in content] == [[0x20, 0xC3], [0xA9], [0x74], [0xEF, 0xBF, 0xBD]]
    assert [one.top_logprobs[0].bytes for one in content] == [one.bytes for one in content]


def test_offsets_count_a_character_once_when_two_tokens_make_it() -> None:
    part = part_of(HALVES, begin=10)
    answer = TextDialect("a", "tiny", scored=True).whole([part], USAGE)
    assert isinstance(answer, responses.Completion)
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.text_offset == [10, 12, 12, 13]
    assert part.end_offset == 14
