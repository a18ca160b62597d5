"""``response.steer`` on the WebSocket: heard at the next turn, told as a response that follows."""

import json
from typing import Any

import openai
import pytest
from openai.types.responses import (
    ResponseSteerAcceptedEvent,
    ResponseSteerFailedEvent,
    ResponseSteerPendingEvent,
)
from websockets.sync.client import ClientConnection

from tests.e2e.kit import Api
from tests.openai_api.conftest import ACMES_KEY
from tests.openai_api.schemas import check, check_events
from tests.openai_api.test_consents import consent
from tests.openai_api.test_responses import WEATHER, streamed
from tests.openai_api.test_socket import ask, connected, take
from tests.support.model_thread import ModelThread, calling, rule

Json = dict[str, Any]
FORMS: dict[str, Any] = {
    "response.steer.accepted": ResponseSteerAcceptedEvent,
    "response.steer.failed": ResponseSteerFailedEvent,
    "response.steer.pending": ResponseSteerPendingEvent,
}
ENDS = ("response.completed", "response.incomplete", "response.failed")


def steer(socket: ClientConnection, response_id: str, said: Any = "in euros", **more: Any) -> None:
    event = {"type": "response.steer", "previous_response_id": response_id, "input": said}
    socket.send(json.dumps({**event, **more}))


def until(socket: ClientConnection, *kinds: str) -> list[Json]:
    """The events up to one of these kinds."""
    found: list[Json] = []
    while not found or found[-1]["type"] not in kinds:
        found.append(take(socket))
        if found[-1]["type"] in FORMS:
            FORMS[found[-1]["type"]].model_validate(found[-1], strict=True)
    return found


def begun(socket: ClientConnection, models: ModelThread | None = None) -> str:
    """The id of the response that begins, once its model is asked."""
    event = until(socket, "response.created")[-1]
    if models is not None:
        models.wait(lambda server: bool(server.raw_calls))
    return str(event["response"]["id"])


def let_go(socket: ClientConnection, models: ModelThread, steers: int = 1) -> list[Json]:
    """The events up to the answers to so many steers, after which the model answers, too."""
    found: list[Json] = []
    for _ in range(steers):
        found += until(socket, "response.steer.accepted", "response.steer.failed")
    models.release()
    return found


def numbers(events: list[Json]) -> list[int]:
    return [event["sequence_number"] for event in events]


def of_the_stream(events: list[Json]) -> list[Json]:
    """Without those of steering, as a stream has them."""
    told = [event for event in events if event["type"] not in FORMS]
    return [{**event, "sequence_number": number} for number, event in enumerate(told)]


def text_of(response: Json) -> str:
    return "".join(
        part["text"]
        for item in response["output"]
        if item["type"] == "message"
        for part in item["content"]
    )


@pytest.mark.parametrize("store", [True, False])
def test_a_steer_is_heard_at_the_next_turn_and_a_response_follows_by_itself(
    api: Api, models: ModelThread, store: bool
) -> None:
    models.script(
        rule("price", calling(("add", {"a": 1, "b": 2}), held=True)),
        rule("euros", {"text": "3 euros."}),
        rule("sure", {"text": "Yes."}),
    )
    with connected(api) as socket:
        ask(socket, input="price", store=store, metadata={"a": "b"})
        first = begun(socket, models)
        steer(socket, first)
        head = [*let_go(socket, models), *until(socket, *ENDS)]
        accepted = [event for event in head if event["type"] == "response.steer.accepted"]
        assert [event["steer"]["previous_response_id"] for event in accepted] == [first]
        assert head[-1]["type"] == "response.incomplete"
        before = head[-1]["response"]
        assert before["incomplete_details"] == {"reason": "steered"}
        assert numbers(head) == list(range(1, len(head) + 1))
        rest = until(socket, *ENDS)
        check_events(rest)
        after = rest[-1]["response"]
        for response in (before, after):
            check("Response", response)
            assert response["metadata"] == {"a": "b"}
        assert after["previous_response_id"] == first and text_of(after) == "3 euros."
        [call] = [item for item in models.calls[-1]["input"] if item.get("type") == "function_call"]
        assert call["name"] == "add"
        ask(socket, input="sure?", store=store, previous_response_id=after["id"])
        assert text_of(until(socket, *ENDS)[-1]["response"]) == "Yes."
        said = json.dumps(models.calls[-1]["input"])
        assert "price" in said and "in euros" in said and "3 euros." in said
        ask(socket, input="sure?", store=store, previous_response_id=first)
        last = until(socket, *ENDS, "error")[-1]
        if store:
            assert after["id"] in last["error"]["message"]
        else:
            assert "in euros" not in json.dumps(models.calls[-1]["input"])
    if not store:
        return
    for response in (before, after):
        path = f"/v1/responses/{response['id']}"
        assert api.http.get(path).json() == response
    assert streamed(api, path=f"/v1/responses/{first}?stream=true")[1:] == [
        {**event, "sequence_number": event["sequence_number"] + 1} for event in of_the_stream(head)
    ]
    given = api.http.get(f"/v1/responses/{after['id']}/input_items").json()
    check("ResponseItemList", given)
    [item] = given["data"]
    assert item["content"] == [{"type": "input_text", "text": "in euros"}]
    again = api.http.post(
        "/v1/responses",
        json={"model": "agent/clerk", "input": [{"type": "item_reference", "id": item["id"]}]},
    )
    assert text_of(again.json()) == "3 euros."


@pytest.mark.parametrize("store", [True, False])
def test_two_steers_at_once_are_heard_in_their_order_by_one_response(
    api: Api, models: ModelThread, store: bool
) -> None:
    models.script(
        rule("price", calling(("add", {"a": 1, "b": 2}), held=True)),
        rule("cents", {"text": "300 cents."}),
    )
    with connected(api) as socket:
        ask(socket, input="price", store=store, stream_id="a")
        first = begun(socket, models)
        parts = [{"type": "input_text", "text": "no, in "}, {"type": "input_text", "text": "cents"}]
        steer(socket, first)
        steer(socket, first, [{"role": "user", "content": parts}])
        head = [*let_go(socket, models, 2), *until(socket, *ENDS)]
        kinds = [event["type"] for event in head]
        assert kinds.count("response.steer.accepted") == 2 and kinds[-1] == ENDS[1]
        assert {event["stream_id"] for event in head} == {"a"}
        rest = until(socket, *ENDS)
        check_events([{k: v for k, v in e.items() if k != "stream_id"} for e in rest])
        assert text_of(rest[-1]["response"]) == "300 cents."
    said = [item for item in models.calls[-1]["input"] if item.get("role") == "user"]
    assert ["euros" in json.dumps(item) for item in said] == [False, True, False]


def test_one_that_comes_too_late_to_be_heard_is_answered_by_a_response_that_follows(
    api: Api, models: ModelThread
) -> None:
    """An answer in a form listens to nothing while it is made."""
    models.script(
        rule("price", {"text": '{"eur": 3}', "held": True}),
        rule("cents", {"text": '{"eur": 300}'}),
    )
    schema = {"type": "object", "properties": {"eur": {"type": "integer"}}, "required": ["eur"]}
    form = {"format": {"type": "json_schema", "name": "price", "schema": schema}}
    with connected(api) as socket:
        ask(socket, input="price", text=form)
        first = begun(socket, models)
        steer(socket, first, "in cents")
        let_go(socket, models)
        assert until(socket, *ENDS)[-1]["type"] == "response.completed"
        rest = until(socket, *ENDS)
        check_events(rest)
        after = rest[-1]["response"]
    assert after["previous_response_id"] == first and text_of(after) == '{"eur": 300}'
    assert '{\\"eur\\": 3}' in json.dumps(models.calls[-1]["input"])


@pytest.mark.parametrize("store", [True, False])
def test_what_waits_for_the_clients_tool_is_pending_and_goes_with_its_output(
    api: Api, models: ModelThread, store: bool
) -> None:
    weather = calling(("get_weather", {"city": "Oslo"}), held=True)
    models.script(rule("weather", weather), rule("celsius|sun", {"text": "Sunny."}))
    body: Json = {"store": store, "tools": [WEATHER]}
    with connected(api) as socket:
        ask(socket, input="weather", **body)
        first = begun(socket, models)
        steer(socket, first, "in celsius")
        let_go(socket, models)
        response = until(socket, *ENDS)[-1]["response"]
        [call] = [item for item in response["output"] if item["type"] == "function_call"]
        pending = until(socket, "response.steer.pending")[-1]
        assert pending["reason"] == "waiting_for_required_input"
        stub = {"type": "function_call_output", "call_id": call["call_id"], "name": "get_weather"}
        assert pending["required_input"] == [stub]
        ask(socket, previous_response_id=first, input="hm?", **body)
        assert "No tool output" in until(socket, "error")[-1]["error"]["message"]
        ask(socket, previous_response_id=first, input=[{**stub, "output": "sun"}], **body)
        assert text_of(until(socket, *ENDS)[-1]["response"]) == "Sunny."
    asked = models.calls[-1]["input"]
    assert asked[-2]["output"] == "sun" and "in celsius" in json.dumps(asked[-1])


def test_what_waits_for_a_consent_is_heard_when_the_run_goes_on(
    api: Api, models: ModelThread
) -> None:
    pay = calling(("wire_money", {"amount": 7}), held=True)
    models.script(rule("pay", pay), rule("thank", {"text": "Paid, thanks."}))
    with connected(api) as socket:
        ask(socket, model="agent/banker", input="pay")
        first = begun(socket, models)
        steer(socket, first, "and thank them")
        let_go(socket, models)
        response = until(socket, *ENDS)[-1]["response"]
        [item] = [one for one in response["output"] if one["type"] == "mcp_approval_request"]
        pending = until(socket, "response.steer.pending")[-1]
        assert pending["required_input"] == [
            {"type": "mcp_approval_response", "approval_request_id": item["id"]}
        ]
        ask(socket, model="agent/banker", input=[consent(item)], previous_response_id=first)
        went_on = until(socket, *ENDS)[-1]["response"]
        assert went_on["incomplete_details"] == {"reason": "steered"}
        assert text_of(until(socket, *ENDS)[-1]["response"]) == "Paid, thanks."


def test_what_cannot_follow_is_given_back(api: Api, models: ModelThread) -> None:
    models.script(rule("fail", {"status": 400, "error": {"message": "no"}, "held": True}))
    with connected(api) as socket:
        ask(socket, input="fail")
        first = begun(socket, models)
        steer(socket, first)
        let_go(socket, models)
        assert until(socket, *ENDS)[-1]["type"] == "response.failed"
        failed = until(socket, "response.steer.failed")[-1]
    assert failed["error"]["code"] == "successor_creation_failed"
    assert failed["steer"]["input"] == "in euros" and failed["steer"]["id"].startswith("steer_")


def test_what_has_ended_or_is_anothers_or_was_never_there_is_not_steered(
    api: Api, models: ModelThread
) -> None:
    models.script(rule("hi", {"text": "hi"}), rule("hold", {"text": "late", "latency_s": 60}))
    acme = {"Authorization": f"Bearer {ACMES_KEY}"}
    with connected(api) as socket, connected(api) as other, connected(api, **acme) as stranger:
        ask(socket, input="hi")
        ended = until(socket, *ENDS)[-1]["response"]["id"]
        ask(socket, input="hold")
        held = begun(socket)
        cases = (
            (socket, ended, "response_already_completed"),
            (other, ended, "response_not_found"),
            (other, held, "response_not_found"),
            (stranger, ended, "response_not_found"),
            (stranger, held, "response_not_found"),
            (socket, "resp_" + "0" * 32, "response_not_found"),
            (socket, "nonsense", "response_not_found"),
        )
        for one, response_id, code in cases:
            steer(one, response_id)
            failed = until(one, "response.steer.failed")[-1]
            assert (failed["error"]["code"], failed["steer"].get("id")) == (code, None)
            assert failed["steer"]["previous_response_id"] == response_id
        ask(stranger, input="hi", previous_response_id=ended)
        assert until(stranger, "error")[-1]["error"]["code"] == "previous_response_not_found"
        assert api.http.post(f"/v1/responses/{held}/cancel").status_code == 200


@pytest.mark.parametrize(
    ("said", "more"),
    [
        ("", {}),
        (7, {}),
        (None, {}),
        ([], {}),
        (["x"], {}),
        ([{"role": "assistant", "content": "x"}], {}),
        ([{"role": "user", "content": "x", "id": "msg_1"}], {}),
        ([{"role": "user", "content": [{"type": "output_text", "text": "x"}]}], {}),
        ([{"role": "user", "content": [{"type": "input_image", "file_id": "file_0"}]}], {}),
        ([{"type": "function_call_output", "call_id": "c", "output": "x"}], {}),
        ("x", {"stream_id": "a"}),
        ("x", {"model": "agent/clerk"}),
    ],
)
def test_what_is_no_message_of_the_users_is_not_said(
    api: Api, models: ModelThread, said: Any, more: Json
) -> None:
    models.script(rule("price", {"text": "3.", "held": True}))
    with connected(api) as socket:
        ask(socket, input="price", store=False)
        first = begun(socket, models)
        steer(socket, first, said, **more)
        failed = next(event for event in iter(lambda: take(socket), None) if "steer" in event)
        assert failed["type"] == "response.steer.failed"
        assert failed["error"]["code"] == "invalid_input"
        models.release()
        events = until(socket, *ENDS)
        assert events[-1]["type"] == "response.completed"


def test_a_conversation_a_goal_and_too_many_at_once_are_refused(
    api: Api, client: openai.OpenAI, models: ModelThread
) -> None:
    models.script(rule("price|first", {"text": "3.", "held": True}))
    kept = client.conversations.create()
    with connected(api) as socket:
        for number, body in enumerate(({"conversation": kept.id}, {"model": "goal"}, {})):
            ask(socket, input="price", stream_id=str(number), **body)
            asked = len(models.calls)
            first = begun(socket)
            if not body:  # What is said before the model is asked is heard at once.
                models.wait(lambda server, asked=asked: len(server.calls) > asked)
            for _ in range(1 if body else 17):
                steer(socket, first)
            failed = until(socket, "response.steer.failed")[-1]
            wanted = "steering_not_supported" if body else "too_many_pending_steers"
            assert failed["error"]["code"] == wanted
            assert failed["stream_id"] == str(number)
            assert api.http.post(f"/v1/responses/{first}/cancel").status_code == 200


def test_the_clients_own_connection_steers(client: openai.OpenAI, models: ModelThread) -> None:
    models.script(
        rule("price", calling(("add", {"a": 1, "b": 2}), held=True)),
        rule("euros", {"text": "3 euros."}),
    )
    seen: list[str] = []
    with client.responses.connect() as connection:
        connection.response.create(model="agent/clerk", input="price")
        for event in connection:
            seen.append(event.type)
            if event.type == "response.created" and seen.count("response.created") == 1:
                connection.response.steer(previous_response_id=event.response.id, input="in euros")
            if event.type == "response.steer.accepted":
                models.release()
            if event.type == "response.completed":
                assert event.response.output_text == "3 euros."
                break
    assert "response.steer.accepted" in seen and "response.incomplete" in seen
