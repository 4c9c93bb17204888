"""Text to token ids, in a thread of its own: long prompts do not hold up other people's streams."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from smartspec.engine_adapter.reference.http.errors import ApiError

log = logging.getLogger("smartspec.http")


class Tokenization:
    """The model's tokenizer and chat template. One thread: tokenizers are not safe for more."""

    def __init__(self) -> None:
        self._tokenizer: Any = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    @property
    def loaded(self) -> bool:
        return self._tokenizer is not None

    async def load(self, source: str) -> None:
        """Load what transformers finds under ``source``."""

        def load() -> Any:
            from transformers import AutoTokenizer  # seconds

            return AutoTokenizer.from_pretrained(source)

        self._tokenizer = await asyncio.get_running_loop().run_in_executor(self._thread, load)

    async def text(self, text: str) -> list[int]:
        """Token ids of a text as it is. Raises `ApiError`."""
        return await self._run("prompt", lambda: self._tokenizer(text)["input_ids"])

    async def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the answer begins. Raises `ApiError`."""

        def encode() -> list[int]:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids

        return await self._run("messages", encode)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self, param: str, encode: Callable[[], list[int]]) -> list[int]:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, encode)
        # Templates and tokenizers raise what they like about text that they refuse.
        except Exception as error:
            log.info("the tokenizer refused %s: %r", param, error)
            raise ApiError(
                400,
                f"{param}: the model's tokenizer or chat template refuses this: {error}",
                param=param,
                code="invalid_value",
            ) from error
