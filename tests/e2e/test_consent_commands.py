"""The commands of those who decide, against a real server: typed, piped, and at a terminal."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.model_thread import ModelThread, calling, rule
from tests.support.server_process import Nursery
from tests.support.terminal import Terminal

from .kit import RUNS, Api, House


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery, models: ModelThread) -> House:
    return House(tmp_path_factory.mktemp("consent"), nursery, models)


@pytest.fixture(scope="module")
def api(house: House) -> Iterator[Api]:
    api = house.start()
    house.env["AGENT_SERVER_URL"] = api.url
    yield api
    api.http.close()


def wires(*amounts: int, key: str = "pay") -> dict[str, Any]:
    """A conversation that wires each amount in a turn of its own."""
    turns = [calling(("wire_money", {"amount": amount})) for amount in amounts]
    return rule(key, *turns, {"text": "all is paid"})


def asked(api: Api, run_id: str) -> dict[str, Any]:
    assert api.ended(run_id)["waiting_for"]["kind"] == "approval"
    (approval,) = api.listed("/api/v1/approvals", status="pending", run_id=run_id)
    return approval


def said(house: House, *argv: str, code: int = 0) -> str:
    """What the command prints, which leaves with ``code``."""
    command = house.run(*argv)
    assert command.exit_code() == code, command.output
    return command.output


def test_the_inbox_is_listed_shown_and_decided_from_the_command_line(
    house: House, api: Api, models: ModelThread
) -> None:
    models.script(wires(3, 4))
    run_id = api.submit(agent="cashier", input="pay")
    first = asked(api, run_id)
    listed = said(house, "approvals", "list", "--run", run_id)
    assert first["id"] in listed and "wire_money(amount=3)" in listed and "Cashier" in listed
    (row,) = json.loads(said(house, "approvals", "list", "--tool", "wire_money", "--json"))
    assert (row["id"], row["arguments"]) == (first["id"], {"amount": 3})
    shown = said(house, "approvals", "show", first["id"])
    assert '"amount": 3' in shown and run_id in shown and "tool/" in shown
    wrong = said(house, "approvals", "approve", first["id"], "--edit", '{"amount": "x"}', code=1)
    assert "do not fit" in wrong and "amount" in wrong
    assert "not JSON" in said(house, "approvals", "approve", first["id"], "--edit", "{", code=1)
    (house.folder / "less.json").write_text('{"amount": 2}')
    argv = ("approvals", "approve", first["id"], "--edit", "@less.json", "--reason", "too much")
    (counts,) = json.loads(said(house, *argv, "--json"))
    assert (counts["replaces"], counts["arguments"]) == (first["id"], {"amount": 2})
    again = said(house, "approvals", "approve", first["id"], code=1)
    assert "replaced already" in again
    second = asked(api, run_id)
    out = said(house, "approvals", "reject", second["id"], "appr_none", "--reason", "no", code=1)
    assert f"{second['id']}: rejected" in out and "no approval 'appr_none'" in out
    assert api.ended(run_id)["output"] == "all is paid"
    inputs = [step["input"] for step in api.steps(run_id) if step["kind"] == "tool"]
    assert inputs == [{"amount": 2}]
    everything = json.loads(said(house, "approvals", "list", "--status", "all", "--json"))
    assert {"rejected", "replaced", "approved"} <= {one["status"] for one in everything}
    assert said(house, "approvals", "list", "--run", run_id) == "Nothing waits for a decision.\n"


def test_a_run_that_nobody_here_can_answer_for_says_how_to_and_leaves_with_3(
    house: House, api: Api, models: ModelThread
) -> None:
    models.script(wires(3))
    out = said(house, "run", "--agent", "cashier", "pay", code=3)
    (approval,) = api.listed("/api/v1/approvals", status="pending")
    assert f"agent-server approvals approve {approval['id']}" in out
    assert f"agent-server runs follow {approval['run_id']}" in out and '"amount": 3' in out
    waits = json.loads(
        said(house, "runs", "follow", approval["run_id"], "--json", code=3).partition("╭")[0]
    )
    assert waits["waiting_for"]["kind"] == "approval"
    out = said(house, "runs", "follow", approval["run_id"], "--approve", "--quiet")
    assert out == "all is paid\n"


def test_a_person_at_the_terminal_is_shown_each_call_and_answers_there(
    house: House, api: Api, models: ModelThread
) -> None:
    models.script(wires(1, 2, 90, 4))
    editor = house.folder / "editor.sh"
    editor.write_text('#!/bin/sh\nsed -i s/90/9/ "$1"\n')
    editor.chmod(0o755)
    env = house.env | {"EDITOR": str(editor)}
    with Terminal("run", "--agent", "cashier", "pay", env=env, folder=house.folder) as seen:
        shown = seen.expect("Approve?")
        for text in ("wire_money asks for consent", "Cashier", '"amount": 1', "appr_"):
            assert text in shown, shown
        seen.type("perhaps")
        seen.expect("One of y, n, e, l, please.")
        seen.type("y")
        seen.expect("Approved.")
        assert '"amount": 2' in seen.expect("Approve?")
        seen.type("n")
        seen.expect("Why")
        seen.type("once is enough")
        seen.expect("Rejected.")
        seen.expect("Approve?")
        seen.type("e")
        assert '"amount": 9' in seen.expect("Approve with these instead?")
        seen.type("y")
        seen.expect("with other arguments")
        seen.expect("Approve?")
        seen.type("later")
        assert seen.exit_code() == 3
    (run_id,) = [run["id"] for run in api.listed(RUNS, status="waiting", agent="cashier")]
    assert "once is enough" in json.dumps(models.calls[-1])
    with Terminal("runs", "follow", run_id, env=env, folder=house.folder) as seen:
        seen.expect("Approve?")
        assert said(house, "approvals", "approve", asked(api, run_id)["id"])
        seen.expect("decided meanwhile")
        assert seen.exit_code() == 0
    inputs = [step["input"]["amount"] for step in api.steps(run_id) if step["kind"] == "tool"]
    assert inputs == [1, 9, 4]


WAIT = {"name": "w", "nodes": [{"id": "a", "type": "wait", "signal": "go"}]}


def test_a_signal_wakes_a_run_and_a_paused_one_says_that_it_is_paused(
    house: House, api: Api
) -> None:
    run_id = api.submit(workflow={**WAIT, "output": "{{ nodes.a.output }}"})
    waits = api.ended(run_id)["waiting_for"]
    assert (waits["kind"], waits["signal"], waits["paused_by"]) == ("signal", "go", None)
    assert "paused by" in said(house, "runs", "pause", run_id)
    paused = api.get(f"{RUNS}/{run_id}")["waiting_for"]
    assert (paused["kind"], paused["signal"]) == ("signal", None) and paused["paused_by"]
    assert "paused by" in said(house, "runs", "list", "--status", "waiting")
    assert "waiting for signal 'go'" in said(house, "runs", "resume", run_id)
    sent = said(house, "runs", "signal", run_id, "go", "--payload", '{"x": [1]}')
    assert f"sent go to {run_id}" in sent
    assert api.ended(run_id)["output"] == {"x": [1]}
    ended = said(house, "runs", "signal", run_id, "go", code=1)
    assert "has already ended" in ended
