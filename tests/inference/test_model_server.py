"""The model server that other tests lean on: as a process, scripted, with the demo's voice."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from agents import Agent, Model, ModelProvider, ModelSettings, RunConfig, Runner

from agent_server.inference.chat_model import ChatModel
from agent_server.inference.demo import DemoModel
from agent_server.inference.demo_reply import LABEL
from agent_server.inference.models import ModelRequest, respond
from agent_server.inference.openai_model import text_of
from agent_server.inference.responses_model import ResponsesModel
from agent_server.inference.wire import Wire
from agent_server.planning.draft import PlanOutput
from agent_server.registry.builtin_tools import calculator
from tests.support.model_server import ModelServer

MODELS = {"responses": ResponsesModel, "chat": ChatModel}
APIS = pytest.mark.parametrize("api", MODELS)


class Provider(ModelProvider):
    def __init__(self, model: Model) -> None:
        self._model = model

    def get_model(self, model_name: str | None) -> Model:
        return self._model


@asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[str]:
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.model_server", *arguments,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert started.stdout is not None
    try:
        port = int(await asyncio.wait_for(started.stdout.readline(), 60))
        yield f"http://127.0.0.1:{port}"
    finally:
        started.kill()
        await started.wait()


@APIS
async def test_over_http_the_demo_voice_plans_and_works_as_the_demo_model_does(api: str) -> None:
    asked = "Goal:\nPlan a party\n\nAvailable tools:\n- tool calculator: Computes."
    planning = ModelRequest("Plan.", asked, ModelSettings(), [], PlanOutput(), [])
    async with ModelServer(demo=True) as server:
        model = MODELS[api]("m", Wire(server.base_url))  # type: ignore[abstract]
        made = json.loads(text_of(await respond(model, planning, lambda text: None)))
        assert made == json.loads(text_of(await respond(DemoModel(), planning, None)))
        agent = Agent(name="A", tools=[calculator])
        config = RunConfig(model_provider=Provider(model), tracing_disabled=True)
        result = await Runner.run(agent, "What is 6 * 7?", run_config=config)
        assert result.final_output.startswith(LABEL) and "42" in result.final_output


async def test_as_a_process_it_takes_a_script_and_tells_its_calls() -> None:
    request = ModelRequest(None, "the weather?", ModelSettings(), [], None, [])
    script: Any = {
        "queue": [{"text": "first"}],
        "rules": [{"match": "weather", "steps": [{"text": "rain"}]}],
        "default": {"text": "else"},
    }
    async with process("--port", "0") as origin, httpx2.AsyncClient(base_url=origin) as client:
        assert (await client.post("/script", json=script)).status_code == 200
        model = ResponsesModel("m", Wire(f"{origin}/v1"))
        said = [text_of(await respond(model, request, None)) for _ in range(2)]
        assert said == ["first", "rain"]
        calls = (await client.get("/calls")).json()
        assert calls["count"] == 2 and calls["models"] == {"m": 2}
        assert calls["calls"][0]["input"][0]["content"] == "the weather?"
        await client.post("/reset")
        assert (await client.get("/calls")).json()["count"] == 0
