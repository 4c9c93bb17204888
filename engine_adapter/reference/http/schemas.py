"""What clients may send: OpenAI's request bodies, a few of vLLM's fields, and our own.

A parameter is *taken*, *ignored* (clients send it, and it changes no token), *neutral only* (it
would change tokens, which this engine cannot do, so only the value that asks for nothing is taken)
or refused. Null means the same as leaving a parameter out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from smartspec.engine_adapter.reference.sequence import MAX_TOP_LOGPROBS

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16

#: What to send where only the neutral value is taken.
NEUTRAL_VALUES = {
    "frequency_penalty": "0",
    "presence_penalty": "0",
    "repetition_penalty": "1",
    "min_p": "0",
    "min_tokens": "0",
    "best_of": "1",
    "echo": "false",
    "suffix": '""',
    "logit_bias": "{}",
    "response_format": '{"type": "text"}',
    "modalities": '["text"]',
    "tools": "[]",
    "tool_choice": '"none"',
    "skip_special_tokens": "true",
    "tool_calls": "[]",
}


Ignored: TypeAlias = Annotated[Any, Field(description="Ignored: it changes nothing here.")]
Zero: TypeAlias = Annotated[float, Field(ge=0, le=0, description="Only 0 is supported.")]
One: TypeAlias = Annotated[float, Field(ge=1, le=1, description="Only 1 is supported.")]
Empty: TypeAlias = Annotated[list[Any], Field(max_length=0, description="Only [] is supported.")]
StopString: TypeAlias = Annotated[str, Field(min_length=1, max_length=1024)]
TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 31)]
MaxTokens: TypeAlias = Annotated[int, Field(ge=1, lt=1 << 31)]


class _Body(BaseModel):
    # Strict: "5" is not 5. What a client means by it, the client should say.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = cls.model_fields
        return {
            name: value for name, value in data.items() if value is not None or name not in known
        }


class Speculation(_Body):
    """Our own field: how this request is drafted for. Its text does not depend on it.

    A deadline per token and a weight are told to the control plane, which may or may not be able
    to keep to them.
    """

    enabled: bool = Field(default=True, description="false: never draft for this request.")
    max_length: int | None = Field(
        default=None, ge=0, le=255, description="Longest speculation length, in draft tokens."
    )
    weight: float = Field(
        default=1.0, ge=1e-6, le=1e6, description="Priority: what a token of this request is worth."
    )
    token_time_target_s: float | None = Field(
        default=None, gt=0, le=3600, description="Seconds per output token to stay below."
    )


class StreamOptions(_Body):
    include_usage: bool = Field(default=False, description="Usage in a last chunk of its own.")
    continuous_usage_stats: bool = Field(default=False, description="vLLM's: usage in every chunk.")
    include_obfuscation: Ignored = None


class ResponseFormat(_Body):
    type: Literal["text"]


class GenerationBody(_Body):
    """What both endpoints take."""

    model: str | None = Field(default=None, description="As /v1/models lists it; may be left out.")
    n: int = Field(default=1, ge=1, le=MAX_CHOICES, description="Answers per prompt.")
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] = []
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, lt=1 << 31, description="vLLM's; 0 and -1: all.")
    ignore_eos: bool = Field(default=False, description="vLLM's: go on after the end of the text.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    speculation: Speculation = Speculation()

    # Ignored.
    user: Ignored = None
    store: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    parallel_tool_calls: Ignored = None
    request_id: Ignored = None

    # Neutral only.
    frequency_penalty: Zero = 0
    presence_penalty: Zero = 0
    repetition_penalty: One = 1
    min_p: Zero = 0
    min_tokens: Zero = 0
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] = {}
    response_format: ResponseFormat | None = None
    skip_special_tokens: Literal[True] = True

    @model_validator(mode="after")
    def _check(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; send one of them")
        return self

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def num_top_logprobs(self) -> int | None:
        """Alternatives per token to tell; None: no log-probabilities."""
        raise NotImplementedError


class CompletionBody(GenerationBody):
    """Body of /v1/completions."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_CHOICES),
        ]
    ) = Field(description="A text, a list of texts, token ids, or a list of lists of them.")
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    best_of: One = 1
    echo: Literal[False] = False
    suffix: Literal[""] = ""

    @property
    def num_top_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    # What clients send along when they hand an answer back.
    name: Ignored = None
    refusal: Ignored = None
    annotations: Ignored = None
    audio: Ignored = None
    reasoning_content: Ignored = None
    function_call: Ignored = None
    tool_calls: Empty = []

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        return {"role": role, "content": "".join(part.text for part in self.content)}


class ChatBody(GenerationBody):
    """Body of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    tools: Empty = []
    tool_choice: Literal["none", "auto"] = "none"
    modalities: list[Literal["text"]] = ["text"]

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        return self

    @property
    def num_top_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class SpeculationHeaders(BaseModel):
    """The same as the field ``speculation``, for gateways; what the body says comes first."""

    model_config = ConfigDict(allow_inf_nan=False)

    x_smartspec_enabled: bool | None = None
    x_smartspec_max_length: int | None = Field(default=None, ge=0, le=255)
    x_smartspec_weight: float | None = Field(default=None, ge=1e-6, le=1e6)
    x_smartspec_token_time_target_s: float | None = Field(default=None, gt=0, le=3600)

    def under(self, body: Speculation) -> Speculation:
        """``body``, with what it leaves out taken from the headers."""
        said = self.model_dump(exclude_none=True)
        named = {name.removeprefix("x_smartspec_"): value for name, value in said.items()}
        return Speculation(**named | body.model_dump(exclude_unset=True))


HEADER_PREFIX = "x-smartspec-"
HEADERS = frozenset(name.replace("_", "-") for name in SpeculationHeaders.model_fields)
