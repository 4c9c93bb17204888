"""A token's text is what it says within a text, and its bytes are those that it brings."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import byte_token, save_tiny_model, space_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from smartspec.engine_adapter.reference.pieces import Pieces

SPACES = space_tokenizer()
SPACED = SPACES.get_vocab()


@pytest.mark.parametrize(
    ("name", "text"), [("▁the", " the"), ("▁", " "), ("ing", "ing"), ("!", "!"), ("<s>", "<s>")]
)
def test_text_has_its_space_when_the_decoder_drops_that_of_a_text(name: str, text: str) -> None:
    assert Pieces(SPACES)[SPACED[name]] == (text, None)


def test_bytes_of_byte_tokens_make_the_character() -> None:
    tokens = [SPACED[f"<0x{byte:02X}>"] for byte in "世é😀".encode()]
    found = [Pieces(SPACES)[token] for token in tokens]
    assert {piece.text for piece in found} == {"\ufffd"}
    assert bytes(byte for piece in found for byte in piece.raw or ()).decode() == "世é😀"


def test_bytes_are_told_of_every_byte_of_a_byte_level_vocabulary(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path))
    pieces = Pieces(tokenizer)
    assert pieces[byte_token("a")] == ("a", None)
    for letter in ("a", " ", "\n", "é", "世", "😀", "\u00ad", "\u0100", "\x7f"):
        tokens = tokenizer.encode(letter, add_special_tokens=False)
        found = [pieces[token] for token in tokens]
        raw = [p.text.encode() if p.raw is None else bytes(p.raw) for p in found]
        assert b"".join(raw) == letter.encode()
        assert all(len(one) == 1 for one in raw)
    told = [pieces[token].raw or list(pieces[token].text.encode()) for token in range(1, 257)]
    assert sorted(told) == [[byte] for byte in range(256)]


def test_a_token_may_bring_a_letter_and_part_of_the_next() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    space, lead = "\u0120", "\u00e4"  # of bytes 0x20 and 0xe4
    vocabulary = {name: i for i, name in enumerate([*alphabet, space + lead])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(space, lead)]))
    tokenizer.decoder = decoders.ByteLevel()
    pieces = Pieces(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert pieces[256] == (" \ufffd", [0x20, 0xE4])
