"""Clients for JavaScript, each by a script that says what it saw: ``openai``, ``@openai/agents``,
and Vercel's AI SDK."""

from typing import Any

import pytest

from tests.clients.conftest import EMBEDDER, KEY, MODEL
from tests.clients.node_project import NodeProject, NotInstalled
from tests.support.model_thread import ModelThread, calling, rule

PLACE = {"city": "Oslo", "people": 700_000}
RULES = (
    rule("capital again", {"text": "Still Oslo."}),
    rule("capital", {"text": "Oslo.", "usage": [12, 3, 4]}),
    rule("count", {"tokens": 3}),
    rule("where", {"json": PLACE}),
    rule("weather", calling(("get_weather", {"city": "Oslo"})), {"text": "Sunny."}),
    rule("my name", {"text": "Hello Ada."}),
    rule("who", {"text": "You are Ada."}),
    rule("hola", calling(("transfer_to_spaniard", {})), {"text": "Buenos dias."}),
    rule("slow", {"text": "late", "latency_s": 60}),
    rule("fail", {"status": 400, "error": {"message": "no such thing"}}),
)


DELTAS = ["tok0 ", "tok1 ", "tok2 "]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> NodeProject:
    try:
        return NodeProject(tmp_path_factory.mktemp("node"))
    except NotInstalled as reason:
        pytest.skip(str(reason))


@pytest.fixture
def saw(
    node: NodeProject, request: pytest.FixtureRequest, base_url: str, models: ModelThread
) -> Any:
    """What the script reports."""
    models.script(*RULES)
    return node.run(request.param, BASE_URL=base_url, API_KEY=KEY, MODEL=MODEL, EMBEDDER=EMBEDDER)


@pytest.mark.parametrize("saw", ["openai_client.mjs"], indirect=True)
def test_the_openai_client_does_with_us_what_it_does_with_openai(saw: Any) -> None:
    assert {"goal", MODEL} <= set(saw.pop("models"))
    assert saw == {
        "plain": "Oslo.",
        "retrieved": "Oslo.",
        "next": "Still Oslo.",
        "inputItems": 1,
        "deltas": DELTAS,
        "streamed": "".join(DELTAS),
        "numbers": list(range(11)),
        "resumed": {"from": 1, "last": "response.completed"},
        "cancelled": "cancelled",
        "deleted": "NotFoundError",
        "parsed": PLACE,
        "tools": "Sunny.",
        "known": "You are Ada.",
        "said": ["my name", "Hello Ada.", "who", "You are Ada."],
        "file": [5, True],
        "embedding": 3,
        "chat": "".join(DELTAS),
        "chatUsage": True,
        "chatParsed": PLACE,
        "chatTools": "Sunny.",
        "model": MODEL,
        "errors": [
            ["NotFoundError", "model_not_found", "model"],
            ["BadRequestError", "invalid_request", "temperature"],
            ["BadRequestError", "invalid_request", "tools[0].type"],
            ["AuthenticationError"],
        ],
    }


@pytest.mark.parametrize("saw", ["agents_sdk.mjs"], indirect=True)
def test_agents_of_the_agents_sdk_have_ours_as_their_model(saw: Any) -> None:
    assert saw.pop("session") == ["You are Ada.", 4]
    failed = {api: tour.pop("failed") for api, tour in saw.items()}
    assert "response.failed" in failed["responses"] and "no such thing" in failed["chat"]
    tour = {
        "answer": "Sunny.",
        "outputs": ["sun in Oslo"],
        "streamed": ["".join(DELTAS), "".join(DELTAS)],
        "streamedTool": "Sunny.",
        "parsed": PLACE,
        "handoff": ["Buenos dias.", "spaniard"],
    }
    assert saw == {"responses": tour, "chat": tour}


@pytest.mark.parametrize("saw", ["ai_sdk.mjs"], indirect=True)
def test_the_ai_sdk_generates_streams_and_calls_its_tools(saw: Any) -> None:
    is_api_error, status, message = saw.pop("refused")
    assert is_api_error and status == 404 and "nobody" in message
    for tour in saw.values():
        assert "no such thing" in tour.pop("failed") and "no such thing" in tour.pop("cut")
    tour = {
        "text": "Oslo.",
        "usage": [12, 3],
        "finish": "stop",
        "deltas": DELTAS,
        "streamUsage": 3,
        "tools": ["Sunny.", [["sun in Oslo"], []]],
        "streamedTools": ["Sunny.", 2],
        "output": PLACE,
        "object": PLACE,
        "streamedObject": PLACE,
    }
    assert saw == {"responses": tour, "unstored": tour, "chat": tour}
