"""The bodies that OpenAI's clients send, as far as they are read here.

Leans on Pydantic. A parameter that is known and not supported is in the model, so that its
refusal can say so; one that is unknown is refused by its name.
"""

from typing import Any, Literal

from pydantic import Field

from agent_server.domain.base import Frozen, JsonObject


class ReasoningParam(Frozen):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: str | None = None


class TextParam(Frozen):
    format: JsonObject | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class StreamOptions(Frozen):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


Metadata = dict[str, str]


class CreateResponse(Frozen):
    """The body of ``POST /v1/responses``."""

    model: str = Field(min_length=1, max_length=300)
    input: str | list[JsonObject] | None = None
    access_programs: Any = None
    background: bool | None = None
    background_options: Any = None
    context_management: Any = None
    conversation: str | JsonObject | None = None
    image: Any = None
    include: list[str] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    max_tool_calls: int | None = Field(default=None, ge=1)
    metadata: Metadata | None = None
    moderation: Any = None
    multi_agent: Any = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    prompt: Any = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    reasoning: ReasoningParam | None = None
    safety_identifier: str | None = Field(default=None, max_length=200)
    service_tier: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    text: TextParam | None = None
    tool_choice: str | JsonObject | None = None
    tools: list[JsonObject] | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    top_p: float | None = Field(default=None, ge=0, le=1)
    truncation: Literal["auto", "disabled"] | None = None
    user: str | None = Field(default=None, max_length=200)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)


class CountInput(Frozen):
    """The body of ``POST /v1/responses/input_tokens``."""

    model: str = Field(min_length=1, max_length=300)
    input: str | list[JsonObject] | None = None
    conversation: str | JsonObject | None = None
    instructions: str | None = None
    parallel_tool_calls: bool | None = None
    personality: Any = None
    previous_response_id: str | None = None
    reasoning: ReasoningParam | None = None
    text: TextParam | None = None
    tool_choice: str | JsonObject | None = None
    tools: list[JsonObject] | None = None
    truncation: Literal["auto", "disabled"] | None = None


class CompactBody(Frozen):
    """The body of ``POST /v1/responses/compact``."""

    model: str = Field(min_length=1, max_length=300)
    input: str | list[JsonObject] | None = None
    previous_response_id: str | None = None
    instructions: str | None = None
    image: Any = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    service_tier: str | None = None


class ExpiresAfter(Frozen):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=3_600, le=2_592_000)


class CreateConversation(Frozen):
    """The body of ``POST /v1/conversations``."""

    items: list[JsonObject] | None = None
    metadata: Metadata | None = None


class UpdateConversation(Frozen):
    """The body of ``POST /v1/conversations/{id}``."""

    metadata: Metadata | None


class AddItems(Frozen):
    """The body of ``POST /v1/conversations/{id}/items``."""

    items: list[JsonObject] = Field(min_length=1)


class UploadFile(Frozen):
    """The form of ``POST /v1/files``."""

    file: bytes
    purpose: Literal["assistants", "vision", "user_data"]
    expires_after: ExpiresAfter | None = None


class CreateEmbedding(Frozen):
    """The body of ``POST /v1/embeddings``."""

    input: str | list[str] | list[int] | list[list[int]]
    model: str = Field(min_length=1, max_length=300)
    dimensions: int | None = Field(default=None, ge=1)
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = Field(default=None, max_length=200)


class CreateChat(Frozen):
    """The body of ``POST /v1/chat/completions``."""

    model: str = Field(min_length=1, max_length=300)
    messages: list[JsonObject] = Field(min_length=1)
    audio: Any = None
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    function_call: Any = None
    functions: Any = None
    logit_bias: Any = None
    logprobs: bool | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    metadata: Metadata | None = None
    modalities: list[str] | None = None
    moderation: Any = None
    n: int | None = None
    parallel_tool_calls: bool | None = None
    prediction: Any = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    prompt_cache_key: str | None = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    response_format: JsonObject | None = None
    safety_identifier: str | None = Field(default=None, max_length=200)
    seed: Any = None
    service_tier: str | None = None
    stop: Any = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    tool_choice: str | JsonObject | None = None
    tools: list[JsonObject] | None = None
    top_logprobs: int | None = None
    top_p: float | None = Field(default=None, ge=0, le=1)
    user: str | None = Field(default=None, max_length=200)
    verbosity: Literal["low", "medium", "high"] | None = None
    web_search_options: Any = None
