"""What became of consent when a run is forked, retried and replayed: it is good for one call, made once."""

import json
from pathlib import Path

from tests.support.model_thread import ModelThread, calling, rule

from .kit import RUNS, Api, Json, check_totals
from .till import APPROVALS, Till, asked_after, decide, finished, inbox


def pays(name: str, **more: int) -> Json:
    """Looks, pays, looks again, and is done: a turn each."""
    return rule(
        rf"\A{name}\b",
        calling(("look", {"what": f"{name} 1"})),
        calling(("pay", {"bill": name, "eur": more.get("eur", 3)})),
        calling(("look", {"what": f"{name} 2"})),
        {"text": f"{name} done"},
    )


def paid(api: Api, models: ModelThread, name: str, decision: str = "approve", **more: Json) -> str:
    """A run that paid, or was not allowed to."""
    models.script(pays(name))
    run_id = api.submit(agent="teller", input=name)
    (asked,) = inbox(api, run_id)
    assert decide(api, asked, decision, **more).status_code == 200
    assert finished(api, run_id)["output"] == f"{name} done"
    return run_id


def fork(api: Api, run_id: str, **body: object) -> Json:
    answer = api.http.post(f"{RUNS}/{run_id}/fork", json=body)
    assert answer.status_code == 202, answer.text
    made: Json = answer.json()
    return made


def step(api: Api, run_id: str, name: str, nth: int = 0) -> str:
    return str([one["key"] for one in api.steps(run_id) if one["name"] == name][nth])


def test_a_fork_asks_anew_for_every_payment_that_it_makes_and_for_none_that_it_shares(
    till: Till, api: Api, models: ModelThread
) -> None:
    run_id = paid(api, models, "rent")
    after = fork(api, run_id, **{"from": step(api, run_id, "look", 1)})
    assert finished(api, after["id"])["output"] == "rent done"
    assert not api.listed(APPROVALS, run_id=after["id"]) and till.book("pay rent") == ["pay rent 3"]
    pay = step(api, run_id, "pay")
    for start, change in (
        (None, {}),
        (step(api, run_id, "look"), {}),
        (pay, {}),
        (pay, {"input": {"bill": "rent", "eur": 2}}),
        ("model/2", {}),
    ):
        made = fork(api, run_id, **({"from": start} if start else {}), **change)
        assert [one["name"] for one in made["will_repeat"]] == ["pay"], start
        (asked,) = inbox(api, made["id"])
        assert asked["arguments"] == change.get("input", {"bill": "rent", "eur": 3}), start
        assert till.book("pay rent") == ["pay rent 3"], start
        assert decide(api, asked, "reject").status_code == 200
        ended = finished(api, made["id"])
        assert ended["output"] == "rent done" and till.book("pay rent") == ["pay rent 3"]
        check_totals(api, ended)
    made = fork(api, run_id, **{"from": pay, "input": {"bill": "rent", "eur": 1}})
    (asked,) = inbox(api, made["id"])
    assert decide(api, asked).status_code == 200 and finished(api, made["id"])["ended_at"]
    assert till.book("pay rent") == ["pay rent 3", "pay rent 1"]


def test_a_fork_behind_a_rejection_or_an_edit_shares_it_and_asks_nobody_again(
    till: Till, api: Api, models: ModelThread
) -> None:
    refused = paid(api, models, "gas", "reject", reason="too dear")
    changed = paid(api, models, "tax", arguments={"bill": "tax", "eur": 1})
    models.script(pays("gas"), pays("tax"))
    for run_id, name in ((refused, "gas"), (changed, "tax")):
        before = till.book("pay")
        made = fork(api, run_id, **{"from": step(api, run_id, "look", 1)})
        ended = finished(api, made["id"])
        assert ended["output"] == f"{name} done" and till.book("pay") == before
        last = fork(api, made["id"], **{"from": "model/4"})
        assert finished(api, last["id"])["output"] == f"{name} done" and till.book("pay") == before
        assert not api.listed(APPROVALS, run_id=made["id"]) + api.listed(
            APPROVALS, run_id=last["id"]
        )
        assert last["will_repeat"] == made["will_repeat"] == []
        assert api.get(f"{RUNS}/{run_id}/compare", **{"with": last["id"]})["same"]


def test_a_run_that_waits_and_its_fork_are_decided_each_for_itself(
    till: Till, api: Api, models: ModelThread
) -> None:
    models.script(pays("toll"))
    first = api.submit(agent="teller", input="toll")
    (asked,) = inbox(api, first)
    other = fork(api, first, **{"from": step(api, first, "look")})["id"]
    (also,) = inbox(api, other)
    assert also["id"] != asked["id"] and also["arguments_hash"] == asked["arguments_hash"]
    assert decide(api, also, "reject").status_code == 200
    assert finished(api, other)["output"] == "toll done" and till.book("pay toll") == []
    assert inbox(api, first) == [asked]
    assert api.http.post(f"{RUNS}/{first}/cancel").status_code == 200
    again = api.http.post(f"{RUNS}/{first}/retry").json()["id"]
    (anew,) = inbox(api, again)
    assert anew["id"] != asked["id"]
    assert decide(api, anew).status_code == 200
    assert finished(api, again)["output"] == "toll done" and till.book("pay toll") == ["pay toll 3"]


def test_a_retry_behind_a_decision_keeps_it_and_makes_no_call_again(
    till: Till, api: Api, models: ModelThread
) -> None:
    no_key = {"status": 401, "error": {"message": "no key"}}
    for name, decision in (("lamp", "approve"), ("sofa", "reject")):
        turns = pays(name)
        models.script({**turns, "steps": [*turns["steps"][:3], no_key]})
        failed = api.submit(agent="teller", input=name)
        assert decide(api, asked_after(api, {"run_id": failed}), decision).status_code == 200
        assert finished(api, failed)["status"] == "failed"
        models.script(pays(name))
        again = api.http.post(f"{RUNS}/{failed}/retry").json()
        assert finished(api, again["id"])["output"] == f"{name} done" and len(models.calls) == 1
        assert not api.listed(APPROVALS, run_id=again["id"])
        assert till.book(f"pay {name}") == ([f"pay {name} 3"] if decision == "approve" else [])


def exported(till: Till, api: Api, run_id: str) -> Path:
    file = till.folder / f"{run_id}.json"
    file.write_text(json.dumps(api.get(f"{RUNS}/{run_id}/export")))
    return file


WAITS = {
    "name": "waits",
    "nodes": [
        {"id": "nap", "type": "wait", "duration_s": 0.05},
        {"id": "word", "type": "wait", "signal": "word"},
        {"id": "ask", "type": "approval", "subject": "Go on?", "input": {"x": 1}},
        {
            "id": "gone",
            "type": "approval",
            "subject": "Nobody?",
            "expires_s": 0.1,
            "on_reject": "continue",
        },
        {"id": "pay", "type": "tool", "tool": "pay", "arguments": {"bill": "flow", "eur": 1}},
        {"id": "say", "type": "agent", "agent": "teller", "input": "say {{ nodes.word.output }}"},
    ],
    "output": ["{{ nodes.ask.output }}", "{{ nodes.gone.output }}", "{{ nodes.say.output }}"],
}


def test_a_workflow_that_waits_is_forked_at_its_waits_and_replayed_without_any(
    till: Till, api: Api, models: ModelThread
) -> None:
    models.script(rule("say", {"text": "said"}))
    run_id = api.submit(workflow=WAITS)
    assert api.http.post(f"{RUNS}/{run_id}/signals/word", json={"w": 7}).status_code == 202
    asked = asked_after(api, {"run_id": run_id})
    assert decide(api, asked, arguments={"x": 2}).status_code == 200
    assert decide(api, asked_after(api, asked, subject="pay")).status_code == 200
    run = finished(api, run_id)
    assert run["status"] == "succeeded", run
    said, nobody, _ = run["output"]
    assert (said["input"], nobody["decision"]) == ({"x": 2}, "expired")
    calls, book = len(models.calls), till.book()
    replay = till.run("replay", str(exported(till, api, run_id)))
    assert replay.exit_code() == 0, replay.output
    assert (len(models.calls), till.book()) == (calls, book)
    tasks = {one["node"]: one["path"] for one in api.listed(f"{RUNS}/{run_id}/tasks")}
    after = fork(api, run_id, **{"from": tasks["say"]})
    assert finished(api, after["id"])["output"] == run["output"] and till.book() == book
    at = fork(api, run_id, **{"from": tasks["ask"]})
    asked = asked_after(api, {"run_id": at["id"]})
    assert (asked["subject"], asked["arguments"]) == ("ask", {"x": 1})
    assert decide(api, asked, "reject").status_code == 200
    assert finished(api, at["id"])["status"] == "failed" and till.book() == book
    before = fork(api, run_id, **{"from": tasks["word"]})["id"]
    assert api.http.post(f"{RUNS}/{before}/signals/word", json="again").status_code == 202
    assert decide(api, asked_after(api, {"run_id": before})).status_code == 200
    assert api.http.post(f"{RUNS}/{before}/cancel").status_code == 200
    assert till.book() == book


def test_a_run_of_agents_with_every_decision_replays_offline(
    till: Till, api: Api, models: ModelThread
) -> None:
    runs = [
        paid(api, models, "one"),
        paid(api, models, "two", "reject", reason="no"),
        paid(api, models, "three", arguments={"bill": "three", "eur": 1}),
    ]
    models.script(rule(r"\Atip", calling(("tip", {"eur": 5})), {"text": "no tip"}))
    tip = api.submit(agent="teller", input="tip")
    assert finished(api, tip)["output"] == "no tip"
    models.script(
        rule("inside", calling(("transfer", {"eur": 5})), {"text": "moved"}),
        rule("head", calling(("ask_banker", {"input": "inside"})), {"text": "told"}),
    )
    inner = api.submit(agent="head", input="head")
    assert decide(api, asked_after(api, {"run_id": inner})).status_code == 200
    assert finished(api, inner)["output"] == "told"
    models.script(rule(r"\Alend", calling(("lend", {"eur": 5})), {"text": "lent"}))
    lent = api.submit(agent="teller", input="lend")
    assert decide(api, inbox(api, lent)[0]).status_code == 200
    assert finished(api, lent)["output"] == "lent"
    calls, book = len(models.calls), till.book()
    for run_id in (*runs, tip, inner, lent):
        replay = till.run("replay", str(exported(till, api, run_id)))
        assert replay.exit_code() == 0, replay.output
    gone = till.run("replay", str(exported(till, api, lent)), TILL="v2")
    assert gone.exit_code() == 1 and "lend" in gone.output, gone.output
    assert (len(models.calls), till.book()) == (calls, book)
