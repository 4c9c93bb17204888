"""Text comes out whole, and stop strings are found wherever tokens are split."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCABULARY, LetterTokenizer

from smartspec.engine_adapter.reference.detokenizer import Detokenizer

TOKENIZER = LetterTokenizer()
PIECES = {piece: i for i, piece in enumerate(LetterTokenizer.pieces)}
FIRST_BYTE, SECOND_BYTE = len(PIECES), len(PIECES) + 1
tokens_strategy = st.lists(st.integers(0, VOCABULARY - 1), max_size=40)


def spell(text: str) -> list[int]:
    return [PIECES[letter] for letter in text]


@given(tokens_strategy, st.lists(st.integers(1, 5), min_size=40, max_size=40))
def test_text_equals_one_decode_when_tokens_arrive_in_pieces(
    tokens: list[int], sizes: list[int]
) -> None:
    # Bytes that make no character have no single right text: leave pairs only.
    whole = [t for t in tokens if t < FIRST_BYTE] + [FIRST_BYTE, SECOND_BYTE]
    detokenizer = Detokenizer(TOKENIZER)
    streamed, rest = "", list(whole)
    for size in sizes:
        detokenizer.push(rest[:size])
        streamed += detokenizer.take()
        rest = rest[size:]
    streamed += detokenizer.take(final=True)
    assert streamed == detokenizer.text == TOKENIZER.decode(whole)


def test_half_a_character_is_held_back_until_it_is_whole() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    texts = []
    for token in (PIECES["a"], FIRST_BYTE, SECOND_BYTE, FIRST_BYTE):
        detokenizer.push([token])
        texts.append(detokenizer.take())
    assert texts == ["a", "", "é", ""]
    assert detokenizer.take(final=True) == "\ufffd"


@pytest.mark.parametrize("sizes", [[1] * 8, [8], [3, 5], [5, 3]])
def test_stop_ends_at_the_same_token_when_tokens_arrive_in_pieces(sizes: list[int]) -> None:
    tokens = [*spell("xy"), PIECES["the"], *spell("nqrst")]
    detokenizer = Detokenizer(TOKENIZER, stop=("enq",))
    used, streamed = 0, ""
    for size in sizes:
        count = detokenizer.push(tokens[used : used + size])
        streamed += detokenizer.take(final=count is not None)
        if count is not None:
            used += count
            break
        used += size
    assert used == 5
    assert streamed == detokenizer.text == "xyth"


def test_text_is_held_back_when_it_may_begin_a_stop_string() -> None:
    detokenizer = Detokenizer(TOKENIZER, stop=("stop!",))
    detokenizer.push([*spell("a"), PIECES["stop"]])
    assert detokenizer.take() == "a"
    detokenizer.push(spell("b"))
    assert detokenizer.take() == "stopb"


def test_first_stop_string_counts_when_several_are_complete() -> None:
    detokenizer = Detokenizer(TOKENIZER, stop=("cde", "bc"))
    assert detokenizer.push([PIECES["ab"], PIECES["cde"], PIECES["z"]]) == 2
    assert detokenizer.text == "a"


@given(
    tokens_strategy,
    st.lists(st.sampled_from(["a", "ab", "bc", "e.", "the", "st", "é"]), min_size=1, max_size=3),
    st.lists(st.integers(1, 6), min_size=40, max_size=40),
)
def test_stops_do_not_depend_on_how_many_tokens_come_at_once(
    tokens: list[int], stop: list[str], sizes: list[int]
) -> None:
    one_by_one = Detokenizer(TOKENIZER, tuple(stop))
    expected = next((i for i, t in enumerate(tokens, 1) if one_by_one.push([t])), None)
    in_pieces = Detokenizer(TOKENIZER, tuple(stop))
    used, found = 0, None
    for size in sizes:
        count = in_pieces.push(tokens[used : used + size])
        if count is not None:
            found = used + count
            break
        used += size
    assert found == expected
    assert in_pieces.take(final=True) == one_by_one.take(final=True)
