"""Text comes out whole, and stop strings are found wherever tokens are split."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCABULARY, LetterTokenizer, space_tokenizer

from smartspec.engine_adapter.reference.detokenizer import Detokenizer

TOKENIZER = LetterTokenizer()
PIECES = {piece: i for i, piece in enumerate(LetterTokenizer.pieces)}
FIRST_BYTE, SECOND_BYTE = len(PIECES), len(PIECES) + 1
tokens_strategy = st.lists(st.integers(0, VOCABULARY - 1), max_size=40)
SPACES = space_tokenizer()
SPACED = SPACES.get_vocab()
#: What a text is made of: words, letters, and the bytes of one character, which stay together.
units_strategy = st.lists(
    st.one_of(
        st.sampled_from([[i] for piece, i in SPACED.items() if not piece.startswith("<")]),
        st.sampled_from([[SPACED[f"<0x{byte:02X}>"] for byte in c.encode()] for c in "世ég😀"]),
    ),
    max_size=20,
).map(lambda units: [token for unit in units for token in unit])


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


@pytest.mark.parametrize("sizes", [[1, 1, 1], [3], [2, 1]])
def test_first_space_stays_when_the_decoder_drops_that_of_a_text(sizes: list[int]) -> None:
    answer = [SPACED[piece] for piece in ("▁world", "!", "▁the")]
    detokenizer = Detokenizer(SPACES, prompt=[SPACED["<s>"], SPACED["▁the"]])
    for size in sizes:
        detokenizer.push(answer[:size])
        answer = answer[size:]
    assert detokenizer.take(final=True) == " world! the"


@given(units_strategy, units_strategy, st.lists(st.integers(1, 5), min_size=80, max_size=80))
def test_prompt_and_answer_are_one_text_when_tokens_arrive_in_pieces(
    prompt: list[int], answer: list[int], sizes: list[int]
) -> None:
    prompt = [SPACED["<s>"], SPACED["▁a"], *prompt]
    detokenizer = Detokenizer(SPACES, prompt=prompt)
    streamed, rest = "", list(answer)
    for size in sizes:
        detokenizer.push(rest[:size])
        streamed += detokenizer.take()
        rest = rest[size:]
    streamed += detokenizer.take(final=True)
    before, whole = (
        SPACES.decode(tokens, skip_special_tokens=True) for tokens in (prompt, prompt + answer)
    )
    assert before + streamed == whole


@given(tokens_strategy, tokens_strategy, st.lists(st.sampled_from(["ab", "e.", "é"]), max_size=2))
def test_prompt_changes_nothing_when_tokens_are_plain_bytes(
    prompt: list[int], answer: list[int], stop: list[str]
) -> None:
    alone, after = Detokenizer(TOKENIZER, tuple(stop)), Detokenizer(TOKENIZER, tuple(stop), prompt)
    assert alone.push(answer) == after.push(answer)
    assert alone.take(final=True) == after.take(final=True)


def test_prompt_is_no_context_when_it_ends_within_a_character() -> None:
    half = SPACED["<0xE4>"]
    detokenizer = Detokenizer(SPACES, prompt=[SPACED["▁a"], half])
    detokenizer.push([SPACED["b"]])
    assert detokenizer.take(final=True) == "b"
