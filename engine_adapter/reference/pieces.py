"""What single tokens say."""

from __future__ import annotations

from smartspec.engine_adapter.reference.detokenizer import Decodes


class Pieces:
    """Texts of tokens by themselves, as they are within a text and not at its beginning.

    Parameters
    ----------
    tokenizer : a fast tokenizer
    """

    def __init__(self, tokenizer: Decodes) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def text(self, token: int) -> str:
        if token not in self._texts:
            # Some decoders drop the space that a text begins with: what the second of two adds.
            once, twice = (self._tokenizer.decode([token] * count) for count in (1, 2))
            self._texts[token] = twice[len(once) :]
        return self._texts[token]
