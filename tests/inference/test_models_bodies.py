"""Our models send what the SDK's own models send, for everything a request can hold."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import httpx2
import pytest
from agents import (
    Agent,
    AgentOutputSchema,
    FileSearchTool,
    FunctionTool,
    HostedMCPTool,
    Model,
    ModelSettings,
    ModelTracing,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    UserError,
    WebSearchTool,
    function_tool,
    handoff,
)
from agents.model_settings import MCPToolChoice
from agents.models.fake_id import FAKE_RESPONSES_ID
from openai import AsyncOpenAI, Omit
from openai.types.shared import Reasoning
from pydantic import BaseModel

from agent_server.inference.chat_model import ChatModel
from agent_server.inference.responses_model import ResponsesModel
from agent_server.inference.wire import Wire
from tests.support.model_server import ModelServer

Json = dict[str, Any]


@function_tool
def weather(city: str, days: int = 1, units: Literal["C", "F"] = "C") -> str:
    """The weather of a city.

    Args:
        city: Where.
    """
    return f"{city} {days} {units}"


class Answer(BaseModel):
    """An answer."""

    title: str
    scores: list[float]


HANDOFF = handoff(Agent(name="Billing Agent", instructions="bill"))
HISTORY: list[Any] = [
    {"role": "user", "content": "What is the weather in Oslo?"},
    {
        "id": "rs_1",
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": "hm"}],
    },
    {
        "id": "fc_1",
        "type": "function_call",
        "call_id": "call_1",
        "name": "weather",
        "arguments": '{"city": "Oslo"}',
        "status": "completed",
    },
    {"type": "function_call_output", "call_id": "call_1", "output": "rain ☔"},
    {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Rain.", "annotations": [], "logprobs": []}],
    },
    {"role": "user", "content": "Thanks"},
]
FOREIGN: list[Any] = [
    {"role": "user", "content": "Hi"},
    {
        "id": FAKE_RESPONSES_ID,
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": "thought"}],
        "provider_data": {"model": "mock", "response_id": "x"},
    },
    {
        "id": FAKE_RESPONSES_ID,
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}],
        "provider_data": {"model": "mock"},
    },
    {"role": "user", "content": "And?"},
]
PICTURE: list[Any] = [
    {"role": "developer", "content": "Look closely."},
    {
        "role": "user",
        "content": [
            {"type": "input_text", "text": "What is this?"},
            {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "auto"},
        ],
    },
]


@dataclass(frozen=True)
class Case:
    input: Any = "Hello"
    instructions: str | None = "Be brief."
    settings: ModelSettings = field(default_factory=ModelSettings)
    tools: tuple[Any, ...] = ()
    handoffs: tuple[Any, ...] = ()
    schema: AgentOutputSchema | None = None
    previous_response_id: str | None = None
    conversation_id: str | None = None
    prompt: Any = None


BOTH: dict[str, Case] = {
    "text": Case(),
    "no instructions": Case(instructions=None),
    "empty instructions": Case(instructions=""),
    "history": Case(HISTORY, tools=(weather,)),
    "items of another provider": Case(FOREIGN),
    "picture": Case(PICTURE),
    "lone surrogate free unicode": Case("Grüße ☃ \u2028 \x00"),
    "tools": Case(tools=(weather,)),
    "handoffs": Case(tools=(weather,), handoffs=(HANDOFF,)),
    "handoffs alone": Case(handoffs=(HANDOFF,), settings=ModelSettings(parallel_tool_calls=True)),
    "schema": Case(schema=AgentOutputSchema(Answer)),
    "loose schema": Case(schema=AgentOutputSchema(dict[str, Any], strict_json_schema=False)),
    "plain text schema": Case(schema=AgentOutputSchema(str)),
    "schema and verbosity": Case(
        schema=AgentOutputSchema(Answer), settings=ModelSettings(verbosity="low")
    ),
    "sampling": Case(settings=ModelSettings(temperature=0.2, top_p=0.9, max_tokens=55)),
    "reasoning": Case(settings=ModelSettings(reasoning=Reasoning(effort="low"), verbosity="high")),
    "storing": Case(
        settings=ModelSettings(
            store=False, metadata={"a": "b"}, prompt_cache_retention="24h", top_logprobs=2
        )
    ),
    "tool choice required": Case(
        tools=(weather,), settings=ModelSettings(tool_choice="required", parallel_tool_calls=False)
    ),
    "tool choice none": Case(tools=(weather,), settings=ModelSettings(tool_choice="none")),
    "tool choice by name": Case(tools=(weather,), settings=ModelSettings(tool_choice="weather")),
    "parallel without tools": Case(settings=ModelSettings(parallel_tool_calls=True)),
    "extras": Case(
        settings=ModelSettings(
            extra_body={"top_k": 3, "model": "other"},
            extra_args={"service_tier": "flex", "user": "u1"},
            extra_query={"api-version": "2"},
        )
    ),
}
RESPONSES: dict[str, Case] = {
    "conversation": Case(conversation_id="conv_1"),
    "previous response": Case(previous_response_id="resp_0"),
    "truncation": Case(
        settings=ModelSettings(
            truncation="auto",
            response_include=["reasoning.encrypted_content"],
            context_management=[{"type": "compaction", "compact_threshold": 200000}],
        )
    ),
    "hosted tools": Case(
        tools=(
            weather,
            WebSearchTool(),
            FileSearchTool(vector_store_ids=["vs"], max_num_results=3, include_search_results=True),
            HostedMCPTool(
                tool_config={"type": "mcp", "server_label": "x", "server_url": "https://x.test"}
            ),
        ),
        settings=ModelSettings(tool_choice="web_search"),
    ),
    "mcp choice": Case(
        tools=(
            HostedMCPTool(
                tool_config={"type": "mcp", "server_label": "x", "server_url": "https://x.test"}
            ),
        ),
        settings=ModelSettings(tool_choice=MCPToolChoice(server_label="x", name="y")),
    ),
    "prompt": Case(prompt={"id": "pmpt_1", "variables": {"a": "b"}}),
    "prompt and named choice": Case(
        prompt={"id": "pmpt_1"}, settings=ModelSettings(tool_choice="lookup")
    ),
}
CHAT: dict[str, Case] = {
    "penalties": Case(settings=ModelSettings(frequency_penalty=0.1, presence_penalty=0.2)),
    "reasoning of the same model": Case(
        [FOREIGN[0], {**FOREIGN[1], "provider_data": {"model": "deepseek-reasoner"}}, *FOREIGN[2:]]
    ),
}
TABLE = [
    *(("responses", name, case) for name, case in {**BOTH, **RESPONSES}.items()),
    *(("chat", name, case) for name, case in {**BOTH, **CHAT}.items()),
]


@pytest.fixture
async def server() -> AsyncIterator[ModelServer]:
    async with ModelServer() as running:
        yield running


async def ask(model: Model, case: Case, stream: bool) -> None:
    arguments: tuple[Any, ...] = (
        case.instructions,
        case.input,
        case.settings,
        list(case.tools),
        case.schema,
        list(case.handoffs),
        ModelTracing.DISABLED,
    )
    more = {
        "previous_response_id": case.previous_response_id,
        "conversation_id": case.conversation_id,
        "prompt": case.prompt,
    }
    if stream:
        async for _ in model.stream_response(*arguments, **more):
            pass
    else:
        await model.get_response(*arguments, **more)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("api", "case"),
    [pytest.param(api, case, id=f"{api}: {name}") for api, name, case in TABLE],
)
async def test_our_body_is_the_one_the_sdks_own_model_sends(
    server: ModelServer, api: str, case: Case, stream: bool
) -> None:
    plain = httpx2.AsyncClient(verify=False)  # no TLS here: loading the certificates is slow
    client = AsyncOpenAI(api_key="k", base_url=server.base_url, max_retries=0, http_client=plain)
    wire = Wire(server.base_url, "k")
    name = "deepseek-reasoner" if case is CHAT["reasoning of the same model"] else "mock"
    pairs: dict[str, tuple[Model, Model]] = {
        "responses": (OpenAIResponsesModel(name, client), ResponsesModel(name, wire)),
        "chat": (OpenAIChatCompletionsModel(name, client), ChatModel(name, wire)),
    }
    theirs, ours = pairs[api]
    await ask(theirs, case, stream)
    await ask(ours, case, stream)
    await client.close()
    expected, sent = (_comparable(call) for call in server.calls)
    if api == "chat" and stream:
        # The one difference: we always ask a stream for its usage.
        expected.setdefault("stream_options", {"include_usage": True})
    assert sent == expected
    assert server.targets[0] == server.targets[1]
    for header in ("authorization", "content-type", "user-agent"):
        assert server.headers[1][header] == server.headers[0][header]


def _comparable(body: Json) -> Json:
    return {**body, "include": sorted(body["include"])} if "include" in body else body


async def test_extra_headers_are_sent_and_an_omitted_one_is_not(server: ModelServer) -> None:
    settings = ModelSettings(extra_headers=cast(Any, {"X-Team": "blue", "Authorization": Omit()}))
    await ask(ResponsesModel("mock", Wire(server.base_url, "k")), Case(settings=settings), False)
    assert server.headers[0]["x-team"] == "blue"
    assert "authorization" not in server.headers[0]


async def test_a_header_with_a_line_break_is_refused(server: ModelServer) -> None:
    settings = ModelSettings(extra_headers={"X-Team": "a\r\nX-Evil: 1"})
    with pytest.raises(UserError, match="line break"):
        await ask(ResponsesModel("mock", Wire(server.base_url)), Case(settings=settings), False)
    assert server.calls == []


@pytest.mark.parametrize("model_type", [ResponsesModel, ChatModel])
async def test_a_field_given_twice_is_refused(server: ModelServer, model_type: Any) -> None:
    settings = ModelSettings(temperature=0.1, extra_args={"temperature": 0.2})
    with pytest.raises(UserError, match="'temperature' twice"):
        await ask(model_type("mock", Wire(server.base_url)), Case(settings=settings), False)


async def test_a_lone_surrogate_travels_as_its_escape(server: ModelServer) -> None:
    await ask(ResponsesModel("mock", Wire(server.base_url)), Case("a \ud800 b"), False)
    assert server.calls[0]["input"][0]["content"] == "a \ud800 b"


async def test_a_tool_changed_between_calls_is_sent_as_it_is_now(server: ModelServer) -> None:
    model = ResponsesModel("mock", Wire(server.base_url))
    tool = FunctionTool("t", "before", {"type": "object", "properties": {}}, cast(Any, None))
    await ask(model, Case(tools=(tool,)), False)
    tool.description = "after"
    await ask(model, Case(tools=(tool,)), False)
    assert [call["tools"][0]["description"] for call in server.calls] == ["before", "after"]
