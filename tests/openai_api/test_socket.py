"""WebSocket on ``/v1/responses``: by the ``openai`` client and by hand."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses.responses_server_event import ResponseWsError
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from agent_server.server import create_app
from agent_server.settings import Settings
from tests.api.harness import listening
from tests.e2e.kit import Api
from tests.openai_api.schemas import check, check_events
from tests.openai_api.test_responses import WEATHER
from tests.support.model_thread import ModelThread, calling, rule

Json = dict[str, Any]
KEY = {"Authorization": "Bearer key-of-the-tests"}


@contextmanager
def connected(api: Api, **headers: str) -> Iterator[ClientConnection]:
    url = api.url.replace("http", "ws") + "/v1/responses"
    with connect(url, additional_headers={**KEY, **headers}) as socket:
        yield socket


def ask(socket: ClientConnection, **body: Any) -> None:
    socket.send(json.dumps({"type": "response.create", "model": "agent/clerk", **body}))


def take(socket: ClientConnection) -> Json:
    found: Json = json.loads(socket.recv(timeout=20))
    return found


def events_of(socket: ClientConnection) -> list[Json]:
    """The events of the next response."""
    found = [take(socket)]
    while found[-1]["type"] not in ("response.completed", "response.failed", "error"):
        found.append(take(socket))
    return found


def refused(socket: ClientConnection) -> Json:
    event = take(socket)
    ResponseWsError.model_validate(event, strict=True)
    check("ErrorResponse", event)
    assert event["status"] >= 400
    error: Json = event["error"]
    return error


def test_the_clients_connection_carries_one_response_after_another(
    client: openai.OpenAI, models: ModelThread
) -> None:
    models.script(rule("my name", {"text": "Hello Ada."}), rule("who", {"text": "Ada."}))
    with client.responses.connect() as connection:
        connection.response.create(model="agent/clerk", input="my name is Ada")
        first = None
        for event in connection:
            if event.type == "response.completed":
                first = event.response
                break
        assert first is not None and first.output_text == "Hello Ada."
        connection.response.create(model="agent/clerk", input="who?", previous_response_id=first.id)
        for event in connection:
            if event.type == "response.completed":
                assert event.response.output_text == "Ada."
                break
    assert "my name is Ada" in json.dumps(models.calls[-1]["input"])
    assert client.responses.retrieve(first.id).output_text == "Hello Ada."


def test_events_are_those_of_a_stream(api: Api, models: ModelThread) -> None:
    models.script(rule("count", {"tokens": 3}))
    with connected(api) as socket:
        ask(socket, input="count")
        events = events_of(socket)
    check_events(events)
    assert sum(event["type"] == "response.output_text.delta" for event in events) == 3


def test_an_unstored_response_is_continued_on_its_connection_alone(
    api: Api, models: ModelThread
) -> None:
    models.script(
        rule("weather", calling(("get_weather", {"city": "Oslo"})), {"text": "Sunny."}),
        rule("sure", {"text": "Yes."}),
    )
    with connected(api) as socket:
        ask(socket, input="weather", store=False, tools=[WEATHER])
        first = events_of(socket)[-1]["response"]
        [call] = [item for item in first["output"] if item["type"] == "function_call"]
        output = {"type": "function_call_output", "call_id": call["call_id"], "output": "sun"}
        body = {"store": False, "tools": [WEATHER], "previous_response_id": first["id"]}
        ask(socket, input="hm?", **body)
        assert "No tool output found" in refused(socket)["message"]
        ask(socket, input=[output], **body)
        events = events_of(socket)
        check_events(events)
        second = events[-1]["response"]
        check("Response", second)
        assert second["output"][-1]["content"][0]["text"] == "Sunny."
        assert second["previous_response_id"] == first["id"]
        ask(socket, input="sure?", store=False, previous_response_id=second["id"])
        assert events_of(socket)[-1]["type"] == "response.completed"
    said = json.dumps(models.calls[-1]["input"])
    assert '"sun"' in said and "Sunny." in said
    assert api.http.get(f"/v1/responses/{first['id']}").status_code == 404
    with connected(api) as socket:
        ask(socket, input="sure?", store=False, previous_response_id=second["id"])
        error = refused(socket)
    assert (error["code"], error["param"]) == (
        "previous_response_not_found",
        "previous_response_id",
    )


def test_a_prepared_input_is_answered_later(api: Api, models: ModelThread) -> None:
    models.script(rule("who", {"text": "Ada."}))
    with connected(api) as socket:
        ask(socket, input="my name is Ada", generate=False)
        events = events_of(socket)
        check_events(events)
        prepared = events[-1]["response"]
        assert prepared["output"] == [] and not models.calls
        ask(socket, input="who am I?", previous_response_id=prepared["id"])
        assert events_of(socket)[-1]["response"]["output"][0]["content"][0]["text"] == "Ada."
    assert "my name is Ada" in json.dumps(models.calls[-1]["input"])


def test_lanes_go_side_by_side_and_each_in_order(api: Api, models: ModelThread) -> None:
    models.script(
        rule("slow", {"text": "slow", "latency_s": 30}),
        rule("one", {"text": "one"}),
        rule("two", {"text": "two"}),
    )
    with connected(api) as socket:
        ask(socket, input="slow", stream_id="a", store=False)
        ask(socket, input="one", stream_id="b")
        ask(socket, input="two", stream_id="b")
        ends = []
        while len(ends) < 2:
            event = take(socket)
            if event["type"] == "response.completed":
                ends.append((event["stream_id"], event["response"]["output"][0]["content"]))
    assert [(lane, content[0]["text"]) for lane, content in ends] == [("b", "one"), ("b", "two")]
    # The slow one was of nobody else: it went with its connection.
    models.wait(lambda server: server.unanswered == 0)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("nonsense", None),
        ("[]", "type"),
        ('{"type": "response.cancel"}', "type"),
        ('{"type": "response.create", "model": "agent/nobody", "input": "x"}', "model"),
        ('{"type": "response.create", "model": "agent/clerk"}', "input"),
        ({"wibble": 1}, "wibble"),
        ({"background": True}, "background"),
        ({"stream": False}, "stream"),
        ({"stream_id": ""}, "stream_id"),
        ({"generate": "maybe"}, "generate"),
        ({"conversation": "conv_x"}, None),
        ({"input": "x" * 1_100_000}, None),
        ("[" * 100 + "]" * 100, None),
    ],
)
def test_what_is_wrong_is_said_and_the_connection_goes_on(
    api: Api, models: ModelThread, message: Any, param: str | None
) -> None:
    models.script(rule("hi", {"text": "hi"}))
    with connected(api) as socket:
        if isinstance(message, str):
            socket.send(message)
        else:
            ask(socket, **{"input": "hi", **message})
        assert refused(socket)["param"] == param
        ask(socket, input="hi")
        assert events_of(socket)[-1]["type"] == "response.completed"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Origin": "https://evil.example"}, 403),
        ({"Host": "evil.example"}, 403),
    ],
)
def test_strangers_and_other_sites_pages_are_not_let_in(
    api: Api, headers: dict[str, str], status: int
) -> None:
    url = api.url.replace("http", "ws")
    with pytest.raises(InvalidStatus) as found:
        with connected(api, **headers):
            pass
    assert found.value.response.status_code == status
    assert json.loads(found.value.response.body or b"")["error"]["type"]
    with pytest.raises(InvalidStatus):
        connect(url + "/v1/models", additional_headers=KEY)


async def test_a_server_that_drains_says_so_and_closes(tmp_path: Path) -> None:
    settings = Settings(
        _env_file=None,  # type: ignore[call-arg]  # an initialiser's option
        database_url=f"sqlite:///{tmp_path}/server.db",
        data_dir=tmp_path,
        model="demo",
    )
    app = create_app(settings)
    async with listening(app) as port:
        async with connect_async(f"ws://127.0.0.1:{port}/v1/responses") as socket:
            await socket.send("[]")
            await socket.recv()
            app.state.drain()
            event = json.loads(await socket.recv())
            assert (event["status"], event["error"]["code"]) == (503, "unavailable")
            with pytest.raises(ConnectionClosed) as closed:
                await socket.recv()
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1012
