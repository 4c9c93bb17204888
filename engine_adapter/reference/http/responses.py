"""What clients get: OpenAI's response bodies, with the numbers of draft tokens in ``usage``."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import BaseModel

FinishReason: TypeAlias = Literal["stop", "length"]


class CompletionTokensDetails(BaseModel):
    """OpenAI's names for it: predictions are drafts."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class TokenTime(BaseModel):
    """What came of a request's ``token_time_target_s``.

    Measured in the decode process: the mean over an answer's tokens after the first, of several
    answers the slowest. Null until all are complete, and where none has a second token.
    """

    target_s: float
    measured_s: float | None
    met: bool | None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    num_draft_tokens: int  #: verified for this request, all answers together
    num_accepted_tokens: int  #: of these
    completion_tokens_details: CompletionTokensDetails
    token_time: TokenTime | None  #: where the request named a target


class CompletionLogprobs(BaseModel):
    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """Answer of /v1/completions; also a chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatTopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatTopLogprob):
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None = None


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletion(BaseModel):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(BaseModel):
    """One event of the stream of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["smartspec"] = "smartspec"
    max_model_len: int  #: vLLM's: tokens of prompt and answer together


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: str
