"""Text of a growing answer: tokens in, characters out, stop strings found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"  #: how decoders show an unfinished multi-byte character
CONTEXT_TOKENS = 4  #: of the prompt, that the first token of the answer is decoded after


class Decodes(Protocol):
    """The one thing asked of a tokenizer here."""

    def decode(self, ids: list[int], skip_special_tokens: bool = ...) -> str: ...


class Detokenizer:
    """Decodes token by token, so that an answer ends at the same token however many came at once.

    A token's text depends on the tokens before it (spaces, bytes of one character). Only a short
    window is decoded: from the last place where the text was complete.

    Parameters
    ----------
    tokenizer : a fast tokenizer
    stop : strings that end the answer
    prompt : what the answer follows: some decoders drop the space that a text begins with
    """

    def __init__(
        self, tokenizer: Decodes, stop: tuple[str, ...] = (), prompt: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._window = self._context(prompt)
        self._num_known = len(self._window)  # tokens whose text is in self.text, or the prompt's
        self._known = self._decode(self._window)  # their text, decoded within the window
        self.text = ""
        self._num_taken = 0

    def push(self, tokens: list[int]) -> int | None:
        """Add tokens. Returns how many were used when a stop string is complete, else None."""
        if not self._stop:
            self._advance(tokens)
            return None
        for count, token in enumerate(tokens, 1):
            before = len(self.text)
            self._advance([token])
            if (at := self._find_stop(before)) is not None:
                self.text = self.text[:at]
                self._window, self._num_known, self._known = [], 0, ""
                return count
        return None

    def take(self, final: bool = False) -> str:
        """The text since the last call, without an end that may turn out to begin a stop string."""
        if final and self._num_known < len(self._window):
            self.text += self._decode(self._window)[len(self._known) :]
            self._window, self._num_known, self._known = [], 0, ""
        end = len(self.text) - (0 if final else self._num_held())
        taken, self._num_taken = self.text[self._num_taken : end], max(end, self._num_taken)
        return taken

    def _context(self, prompt: Sequence[int]) -> list[int]:
        # A character is four tokens at most: one of four windows in a row begins with a whole one.
        for size in range(CONTEXT_TOKENS, CONTEXT_TOKENS + 4):
            window = list(prompt[-size:])
            if not self._decode(window).endswith(REPLACEMENT):
                return window
        return []  # the prompt ends within a character

    def _advance(self, tokens: list[int]) -> None:
        self._window.extend(tokens)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) or len(text) <= len(self._known):
            return
        self.text += text[len(self._known) :]
        # The tokens before the newest complete text are only context: drop what is older.
        self._window = self._window[self._num_known :]
        self._num_known = len(self._window)
        self._known = self._decode(self._window)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _find_stop(self, before: int) -> int | None:
        found = [
            at
            for stop in self._stop
            if (at := self.text.find(stop, max(0, before - len(stop) + 1))) >= 0
        ]
        return min(found, default=None)

    def _num_held(self) -> int:
        return max(
            (
                size
                for stop in self._stop
                for size in range(min(len(stop) - 1, len(self.text)), 0, -1)
                if self.text.endswith(stop[:size])
            ),
            default=0,
        )
