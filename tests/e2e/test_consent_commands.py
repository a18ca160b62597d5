"""The commands of those who decide, against a real server: typed, piped, and at a terminal."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.model_thread import ModelThread, calling, rule
from tests.support.server_process import Nursery
from tests.support.terminal import Terminal

from .kit import RUNS, Api, House
from .till import Till, finished, in_book, restart


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
        seen.expect("Approve?")
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
        assert api.server is not None
        asyncio.run(api.server.kill())
        again = house.start(port=api.server.port)  # a question outlives its server
        assert said(house, "approvals", "approve", asked(again, run_id)["id"])
        seen.expect("decided meanwhile")
        assert seen.exit_code() == 0
    api.server = again.server
    inputs = [step["input"]["amount"] for step in api.steps(run_id) if step["kind"] == "tool"]
    assert inputs == [1, 9, 4]


@pytest.mark.parametrize("till", ["sqlite"], indirect=True)
def test_a_call_in_doubt_is_listed_and_settled_by_command_and_at_the_terminal(
    till: Till, models: ModelThread
) -> None:
    names = ("happened", "did-not-happen", "fail", "typed")
    rules = [
        rule(rf"\A{name}\b", calling(("stall", {"what": name})), {"text": f"{name} ends"})
        for name in names
    ]
    models.script(*rules)
    api = till.start()
    runs = {name: api.submit(agent="teller", input=name) for name in names}
    for name, run_id in runs.items():
        in_book(till, api, run_id, f"stall {name}")
    restart(till, api)
    for run_id in runs.values():
        assert api.ended(run_id)["waiting_for"]["kind"] == "reconciliation"

    def told(*argv: str, code: int = 0) -> str:
        return said(till, *argv, "--server", api.url, code=code)

    listed = told("reconcile", "list")
    assert all(
        run_id in listed and f"stall(what={name})" in listed for name, run_id in runs.items()
    )
    (one,) = [
        x for x in json.loads(told("reconcile", "list", "--json")) if x["run_id"] == runs["fail"]
    ]
    assert one["status"] == "in_doubt"
    out = told("runs", "follow", runs["fail"], code=3)
    assert f"agent-server reconcile did-not-happen {runs['fail']} {one['key']}" in out
    told("reconcile", "happened", runs["happened"], "--result", '{"ref": 77}')
    assert "is in doubt" in told("reconcile", "happened", runs["happened"], code=1)
    told("reconcile", "did-not-happen", runs["did-not-happen"])
    told("reconcile", "fail", runs["fail"], one["key"], "--reason", "nobody knows")
    with Terminal(
        "runs", "follow", runs["typed"], "--server", api.url, env=till.env, folder=till.folder
    ) as seen:
        assert "stall is in doubt" in seen.expect("Did it happen?")
        seen.type("y")
        seen.expect("What did it give?")
        seen.type("a text")
        assert seen.exit_code() == 0
    for name in ("happened", "did-not-happen", "typed"):
        assert finished(api, runs[name])["output"] == f"{name} ends"
    failed = finished(api, runs["fail"])
    assert failed["status"] == "failed" and "nobody knows" in failed["error"]["message"]
    given = {
        n: [s["output"] for s in api.steps(r) if s["kind"] == "tool"][0] for n, r in runs.items()
    }
    assert (given["happened"], given["typed"]) == ({"ref": 77}, "a text")
    assert sorted(till.book("stall")) == sorted(
        [*(f"stall {n}" for n in names), "stall did-not-happen"]
    )
    assert told("reconcile", "list") == "No call is in doubt.\n"
    api.server.stop()


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
