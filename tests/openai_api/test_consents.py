"""Approvals as ``mcp_approval_request`` items: the same record as in the inbox, decided once."""

import json
import signal
from typing import Any

import openai
import pytest

from tests.e2e.kit import Api, House
from tests.openai_api.schemas import check, check_events
from tests.openai_api.test_responses import WEATHER, streamed
from tests.support.model_thread import ModelThread, calling, rule

ASK: Any = {"model": "agent/banker", "input": "pay"}


def consent(item: Any, approve: bool = True, **more: Any) -> dict[str, Any]:
    identity = item["id"] if isinstance(item, dict) else item.id
    return {
        "type": "mcp_approval_response",
        "approval_request_id": identity,
        "approve": approve,
        **more,
    }


def paying(models: ModelThread, *amounts: int) -> None:
    calls = [("wire_money", {"amount": amount}) for amount in amounts or (7,)]
    models.script(rule("pay", calling(*calls), {"text": "Paid."}))


def test_a_consent_lets_the_run_go_on_as_a_response_of_its_own(
    api: Api, client: openai.OpenAI, models: ModelThread
) -> None:
    paying(models)
    first = client.responses.create(**ASK)
    check("Response", json.loads(first.to_json()))
    assert first.status == "completed"
    [item] = first.output
    assert item.type == "mcp_approval_request"
    assert (item.name, json.loads(item.arguments)) == ("wire_money", {"amount": 7})
    run_id = "run_" + first.id.removeprefix("resp_")
    assert api.http.get(f"/api/v1/runs/{run_id}").json()["status"] == "waiting"
    [pending] = api.listed("/api/v1/approvals", status="pending", run_id=run_id)
    assert pending["id"].removeprefix("appr_") == item.id.removeprefix("mcpr_")
    with pytest.raises(openai.BadRequestError, match="mcp_approval_response"):
        client.responses.create(model="agent/banker", input="hm", previous_response_id=first.id)
    answer: Any = [consent(item, reason="fine")]
    second = client.responses.create(
        model="agent/banker", previous_response_id=first.id, input=answer
    )
    check("Response", json.loads(second.to_json()))
    assert second.output_text == "Paid." and second.previous_response_id == first.id
    assert second.usage is not None and second.usage.input_tokens > 0
    run = api.http.get(f"/api/v1/runs/{run_id}").json()
    assert run["status"] == "succeeded" and run["usage"]["tool_calls"] == 1
    assert client.responses.retrieve(second.id) == second
    assert client.responses.retrieve(first.id) == first
    check("ResponseItemList", api.http.get(f"/v1/responses/{second.id}/input_items").json())
    [given] = client.responses.input_items.list(second.id).data
    assert given.type == "mcp_approval_response" and given.approve
    with pytest.raises(openai.ConflictError, match="approved already"):
        client.responses.create(model="agent/banker", previous_response_id=first.id, input=answer)
    with pytest.raises(openai.BadRequestError, match=second.id):
        client.responses.create(model="agent/banker", input="hm", previous_response_id=first.id)
    models.script(rule("thanks", {"text": "Welcome."}))
    third = client.responses.create(
        model="agent/banker", input="thanks", previous_response_id=second.id
    )
    assert third.output_text == "Welcome."
    assert "sent 7" in json.dumps(models.calls[-1]["input"])


def test_streams_end_with_the_question_and_begin_anew_with_the_answer(
    api: Api, models: ModelThread
) -> None:
    paying(models)
    asking = streamed(api, ASK)
    check_events(asking)
    first = asking[-1]["response"]
    [item] = first["output"]
    assert item["type"] == "mcp_approval_request"
    going = streamed(api, {"model": "agent/banker", "input": [consent(item)]})
    check_events(going)
    second = going[-1]["response"]
    assert second["output"][-1]["content"][0]["text"] == "Paid."
    ids = [one["id"] for one in (*first["output"], *second["output"])]
    assert len(set(ids)) == len(ids)
    path = f"/v1/responses/{second['id']}?stream=true"
    again = streamed(api, path=path)
    check_events(again)
    assert again[-1] == {**going[-1], "sequence_number": len(again) - 1}
    assert streamed(api, path=path + "&starting_after=2") == again[3:]
    assert streamed(api, path=f"/v1/responses/{first['id']}?stream=true") == asking


def test_every_question_is_answered_at_once(client: openai.OpenAI, models: ModelThread) -> None:
    paying(models, 1, 2)
    first = client.responses.create(**ASK)
    one, two = first.output
    half: Any = [consent(one)]
    with pytest.raises(openai.BadRequestError, match=two.id or ""):
        client.responses.create(model="agent/banker", previous_response_id=first.id, input=half)
    whole: Any = [consent(one), consent(two, approve=False, reason="too much")]
    second = client.responses.create(
        model="agent/banker", previous_response_id=first.id, input=whole
    )
    assert second.output_text == "Paid."
    told = json.dumps(models.calls[-1]["input"])
    assert "sent 1" in told and "too much" in told and "sent 2" not in told


def test_the_inbox_decides_the_same_question(
    api: Api, client: openai.OpenAI, models: ModelThread
) -> None:
    paying(models)
    first = client.responses.create(**ASK)
    [item] = first.output
    assert client.responses.retrieve(first.id).status == "completed"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id + "0001")
    approval = "appr_" + (item.id or "").removeprefix("mcpr_")
    decided = api.http.post(f"/api/v1/approvals/{approval}", json={"decision": "approve"})
    assert decided.status_code == 200
    *_, last = client.responses.retrieve(first.id + "0001", stream=True)
    assert last.type == "response.completed" and last.response.output_text == "Paid."
    late: Any = [consent(item)]
    with pytest.raises(openai.ConflictError):
        client.responses.create(model="agent/banker", previous_response_id=first.id, input=late)


def test_what_the_inbox_left_open_is_answered_into_the_response_that_waits_for_it(
    api: Api, client: openai.OpenAI, models: ModelThread
) -> None:
    paying(models, 1, 2)
    first = client.responses.create(**ASK)
    one, two = first.output
    approval = "appr_" + (one.id or "").removeprefix("mcpr_")
    decided = api.http.post(f"/api/v1/approvals/{approval}", json={"decision": "approve"})
    assert decided.status_code == 200
    assert client.responses.retrieve(first.id + "0001").status == "in_progress"
    rest: Any = [consent(two)]
    second = client.responses.create(
        model="agent/banker", previous_response_id=first.id, input=rest
    )
    assert second.id == first.id + "0001" and second.output_text == "Paid."
    assert len(client.responses.input_items.list(second.id).data) == 2


def test_in_a_conversation(client: openai.OpenAI, models: ModelThread) -> None:
    paying(models)
    kept = client.conversations.create()
    first = client.responses.create(**ASK, conversation=kept.id)
    answer: Any = [consent(first.output[0])]
    with pytest.raises(openai.BadRequestError, match="not of this conversation"):
        other = client.conversations.create()
        client.responses.create(model="agent/banker", conversation=other.id, input=answer)
    second = client.responses.create(model="agent/banker", conversation=kept.id, input=answer)
    assert second.output_text == "Paid."
    assert len(list(client.conversations.items.list(kept.id))) == 4


def test_in_the_background_and_over_a_restart(house: House, models: ModelThread) -> None:
    paying(models)
    key = {"authorization": "Bearer key-of-the-tests"}
    server = house.start(AGENT_SERVER_DATA_DIR=str(house.folder / "again"))
    server.http.headers.update(key)
    begun = server.http.post("/v1/responses", json={**ASK, "background": True}).json()
    last = streamed(server, path=f"/v1/responses/{begun['id']}?stream=true")[-1]
    [item] = last["response"]["output"]
    assert server.server is not None
    server.server.signal(signal.SIGKILL)
    assert house.ended(server)
    server = house.start(AGENT_SERVER_DATA_DIR=str(house.folder / "again"))
    server.http.headers.update(key)
    body = {
        "model": "agent/banker",
        "previous_response_id": begun["id"],
        "input": [consent(item)],
        "background": True,
    }
    going = server.http.post("/v1/responses", json=body).json()
    check("Response", going)
    assert going["id"] == begun["id"] + "0001"
    events = streamed(server, path=f"/v1/responses/{going['id']}?stream=true")
    assert events[-1]["response"]["output"][-1]["content"][0]["text"] == "Paid."
    assert server.server is not None
    server.server.signal(signal.SIGKILL)
    assert house.ended(server)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"temperature": 0.5}, "temperature"),
        ({"instructions": "Be bad."}, "instructions"),
        ({"model": "agent/clerk"}, "model"),
        ({"previous_response_id": "resp_" + "0" * 32}, "previous_response_id"),
    ],
)
def test_a_consent_changes_nothing_else(
    client: openai.OpenAI, models: ModelThread, change: Any, text: str
) -> None:
    paying(models)
    first = client.responses.create(**ASK)
    body: Any = {"model": "agent/banker", "input": [consent(first.output[0])], **change}
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**body)
    assert refused.value.param == text


@pytest.mark.parametrize(
    "item",
    [
        {"id": "mcpr_" + "0" * 32},
        {"id": "x"},
    ],
)
def test_a_forged_consent_is_refused(client: openai.OpenAI, item: Any) -> None:
    forged: Any = [consent(item)]
    with pytest.raises(openai.BadRequestError, match="There is no approval request"):
        client.responses.create(model="agent/banker", input=forged)


def test_a_run_that_is_not_stored_cannot_wait(client: openai.OpenAI, models: ModelThread) -> None:
    paying(models)
    response = client.responses.create(**ASK, store=False)
    assert response.status == "failed" and response.error is not None
    assert "store" in response.error.message


def test_a_consent_and_a_call_for_the_client_in_one_turn(
    client: openai.OpenAI, models: ModelThread
) -> None:
    models.script(
        rule(
            "pay",
            calling(("wire_money", {"amount": 7}), ("get_weather", {"city": "Oslo"})),
            {"text": "Paid in the sun."},
        )
    )
    tools: Any = [WEATHER]
    first = client.responses.create(**ASK, tools=tools)
    assert [item.type for item in first.output] == ["mcp_approval_request"]
    answer: Any = [consent(first.output[0])]
    second = client.responses.create(
        model="agent/banker", previous_response_id=first.id, input=answer, tools=tools
    )
    [call] = [item for item in second.output if item.type == "function_call"]
    assert call.name == "get_weather"
    third = client.responses.create(
        model="agent/banker",
        previous_response_id=second.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "sun"}],
        tools=tools,
    )
    assert third.output_text == "Paid in the sun."
    outputs = [i["output"] for i in models.calls[-1]["input"] if "output" in i]
    assert sorted(map(str, outputs)) == ["sent 7", "sun"]
