"""What single tokens say."""

from __future__ import annotations

import re
from typing import NamedTuple, Protocol

from smartspec.engine_adapter.reference.detokenizer import REPLACEMENT, Decodes


class Spells(Decodes, Protocol):
    """A tokenizer that tells how its vocabulary writes a token."""

    def convert_ids_to_tokens(self, ids: int) -> str: ...


class Piece(NamedTuple):
    """A token by itself, as it is within a text and not at its beginning."""

    text: str
    raw: list[int] | None  #: its bytes, where the text has not all of them


class Pieces:
    """Tokens' pieces, each looked up once.

    Parameters
    ----------
    tokenizer : a fast tokenizer
    """

    def __init__(self, tokenizer: Spells) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, Piece] = {}

    def __getitem__(self, token: int) -> Piece:
        if token not in self._known:
            # Some decoders drop the space that a text begins with: what the second of two adds.
            once, twice = (self._tokenizer.decode([token] * count) for count in (1, 2))
            text = twice[len(once) :]
            raw = None
            if REPLACEMENT in text:
                raw = _bytes(self._tokenizer.convert_ids_to_tokens(token))
            self._known[token] = Piece(text, raw)
        return self._known[token]


def _bytes(name: str) -> list[int] | None:
    """Of a token by its name in the vocabulary; None where that is a text."""
    if found := re.fullmatch("<0x([0-9A-F]{2})>", name):
        return [int(found[1], 16)]
    if all(letter in _BYTE_OF for letter in name):
        return [_BYTE_OF[letter] for letter in name]
    return None


def _byte_letters() -> dict[str, int]:
    """Bytes by the letters of byte-level vocabularies (GPT-2's).

    A byte that Latin-1 prints is its own letter; the others, in order, have those from U+0100 on.
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printed]
    found = {chr(byte): byte for byte in printed}
    return found | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_letters()
