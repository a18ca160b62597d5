"""Rows 3 and 13 of the attacks, over HTTP and on both databases: no effect without somebody's consent."""

import json
from concurrent.futures import ThreadPoolExecutor

from tests.support.model_thread import ModelThread, calling, rule

from .kit import RUNS, Api, Json, check_totals, problem, types
from .till import APPROVALS, Till, asked_after, asking, decide, finished, inbox, restart


def test_of_twenty_decisions_at_once_one_counts(till: Till, api: Api, models: ModelThread) -> None:
    run_id, asked = asking(api, models, "rent")
    words = ["approve", "reject"] * 10
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda word: decide(api, asked, word), words))
    counted = [word for word, answer in zip(words, answers, strict=True) if answer.is_success]
    assert len(counted) == 1
    for answer in answers:
        if not answer.is_success:
            problem(answer, 409, "already_decided")
    run = finished(api, run_id)
    assert run["status"] == "succeeded"
    assert till.book("rent") == (["pay rent 3"] if counted == ["approve"] else [])
    assert types(api.events(run_id)).count("approval.decided") == 1
    problem(decide(api, asked), 409, "already_decided")
    check_totals(api, run)


def test_a_made_up_or_misread_decision_is_refused_and_the_call_still_waits(
    till: Till, api: Api, models: ModelThread
) -> None:
    run_id, asked = asking(api, models, "gas")
    problem(decide(api, {"id": "appr_" + "0" * 32}), 404, "not_found")
    problem(decide(api, {"id": "..%2Fruns"}), 404, "not_found")
    place = f"{APPROVALS}/{asked['id']}"
    for body in (
        {},
        {"decision": "yes"},
        {"decision": "approve", "by": "the boss"},
        {"decision": "approve", "status": "approved"},
        {"decision": ["approve"]},
        {"approved": True},
        {"decision": "reject", "arguments": {"bill": "gas", "eur": 1}},
    ):
        problem(api.http.post(place, json=body), 422, "invalid_request")
    for wrong in (
        {"eur": 3},
        {"bill": "gas", "eur": "3 € "},
        {"bill": "gas", "eur": 3, "x": 1},
        [],
    ):
        told = problem(decide(api, asked, arguments=wrong), 422, "invalid_request")
        assert told["errors"][0]["path"].startswith("/arguments"), told
    other = problem(decide(api, asked, arguments_hash="0" * 64), 409, "conflict")
    assert asked["arguments_hash"] in other["detail"]
    assert inbox(api, run_id) == [asked] and till.book("gas") == []
    changed = decide(api, asked, arguments={"bill": "gas", "eur": 2}).json()
    assert (changed["replaces"], changed["status"]) == (asked["id"], "approved")
    assert changed["arguments_hash"] != asked["arguments_hash"]
    assert finished(api, run_id)["output"] == "gas done" and till.book("gas") == ["pay gas 2"]
    assert api.get(place)["status"] == "replaced"
    problem(decide(api, asked), 409, "already_decided")
    problem(decide(api, changed), 409, "already_decided")
    assert till.book("gas") == ["pay gas 2"]


def test_consent_to_one_call_is_none_to_the_same_call_of_another_turn_or_run(
    till: Till, api: Api, models: ModelThread
) -> None:
    again = calling(("pay", {"bill": "tax", "eur": 9}))
    again["tool_calls"][0]["id"] = "call_same"
    models.script(rule(r"\Atax", again, again, {"text": "twice"}))
    first, second = (api.submit(agent="teller", input="tax") for _ in range(2))
    one, other = inbox(api, first)[0], inbox(api, second)[0]
    assert one["arguments_hash"] == other["arguments_hash"] and one["id"] != other["id"]
    answer = decide(api, one, arguments_hash=one["arguments_hash"])
    assert answer.status_code == 200
    later = asked_after(api, one)
    assert till.book("tax") == ["pay tax 9"] and inbox(api, second) == [other]
    assert decide(api, later, "reject", reason="once is enough").status_code == 200
    assert finished(api, first)["output"] == "twice" and till.book("tax") == ["pay tax 9"]
    assert api.http.post(f"{RUNS}/{second}/cancel").status_code == 200
    problem(decide(api, other), 409, "already_decided")
    problem(api.http.post(f"{RUNS}/{second}/cancel"), 409, "run_ended")
    problem(api.http.post(f"{RUNS}/{second}/pause"), 409, "run_ended")
    problem(api.http.post(f"{RUNS}/{second}/signals/go"), 409, "run_ended")
    said = {"step": other["step"], "outcome": "did_not_happen"}
    problem(api.http.post(f"{RUNS}/{second}/reconcile", json=said), 409, "run_ended")
    assert till.book("tax") == ["pay tax 9"]


def test_nobody_decides_after_expiry_or_who_may_not(
    till: Till, api: Api, models: ModelThread
) -> None:
    models.script(
        rule(r"\Atip", calling(("tip", {"eur": 5})), {"text": "no tip"}),
        rule(r"\Agift", calling(("gift", {"eur": 5})), {"text": "no gift"}),
    )
    tip = api.submit(agent="teller", input="tip")
    run = finished(api, tip)
    assert run["output"] == "no tip" and "Nobody decided" in json.dumps(models.calls[-1])
    (late,) = api.listed(APPROVALS, run_id=tip)
    assert late["status"] == "expired"
    assert "expired" in problem(decide(api, late), 409, "already_decided")["detail"]
    gift = api.submit(agent="teller", input="gift")
    (asked,) = inbox(api, gift)
    assert "the boss" in problem(decide(api, asked), 403, "forbidden")["hint"]
    assert inbox(api, gift) == [asked]
    assert api.http.post(f"{RUNS}/{gift}/cancel").status_code == 200
    assert till.book("tip") == till.book("gift") == []


def test_a_model_that_obeys_a_hostile_page_has_no_effect_and_what_asks_nothing_does_not_wait(
    till: Till, api: Api, models: ModelThread
) -> None:
    ransom = ("pay", {"bill": "ransom", "eur": 1_000_000})
    obeying = calling(ransom, ("look", {"what": "ransom"}))
    models.script(
        rule("page", calling(("read_page", {"url": "x"})), obeying, {"text": "as you wish"})
    )
    run_id = api.submit(agent="teller", input="page")
    (asked,) = inbox(api, run_id)
    assert asked["arguments"] == ransom[1] and asked["agent"] == "Teller"
    assert till.book("ransom") == ["look ransom"]
    assert decide(api, asked, "reject").status_code == 200
    assert finished(api, run_id)["output"] == "as you wish"
    assert till.book("ransom") == ["look ransom"]


def test_a_budget_below_the_first_call_or_beyond_reason_is_refused_before_anything_is_stored(
    till: Till, api: Api, models: ModelThread
) -> None:
    models.script(default={"text": "hello"})
    before = len(api.listed(RUNS))
    body: Json = {"agent": "teller", "input": "a long question " * 400}
    for budget in ({"max_tokens": 5}, {"max_cost_usd": "0.01"}):
        told = problem(api.post({**body, "budget": budget}), 422, "budget_refused")
        assert told["hint"], told
    for absurd in (0, -1, 2**60, "many", 1.5, True):
        wrong = {**body, "budget": {"max_model_calls": absurd}}
        problem(api.post(wrong), 422, "invalid_request")
    for absurd in (0, -0.5, "NaN", "1e400"):
        problem(api.post({**body, "budget": {"deadline_s": absurd}}), 422, "invalid_request")
    assert len(api.listed(RUNS)) == before and models.calls == []


def test_an_mcp_servers_tool_waits_for_consent_directly_and_inside_agents_over_a_restart(
    till: Till, api: Api, models: ModelThread
) -> None:
    def banks(eur: int) -> list[Json]:
        calls = ("transfer", {"eur": eur}), ("balance", {}), ("look", {"what": f"at {eur}"})
        return [calling(*calls), {"text": f"sent {eur}"}]

    ask = calling(("ask_banker", {"input": "move it"}))
    models.script(
        rule("move it", *banks(43)),
        rule("head", ask, {"text": "the boss is told"}),
        rule("lobby", calling(("transfer_to_banker", {})), *banks(42)),
        rule("banker", *banks(41)),
    )
    answers = {"banker": "sent 41", "lobby": "sent 42", "head": "the boss is told"}
    before = len(till.book())
    runs = {agent: api.submit(agent=agent, input=agent) for agent in answers}
    asked = {agent: inbox(api, run_id)[0] for agent, run_id in runs.items()}
    eur = {agent: one["arguments"]["eur"] for agent, one in asked.items()}
    assert eur == {"banker": 41, "lobby": 42, "head": 43}
    assert {(one["subject"], one["agent"]) for one in asked.values()} == {("transfer", "Banker")}
    seen = sorted(till.book()[before:])
    assert seen == ["balance"] * 3 + ["look at 41", "look at 42", "look at 43"]
    restart(till, api)
    for agent, one in asked.items():
        assert inbox(api, runs[agent]) == [one]
        assert decide(api, one).status_code == 200
    for agent, output in answers.items():
        run = finished(api, runs[agent])
        assert run["output"] == output, run
        check_totals(api, run)
    paid = sorted(till.book("transfer"))
    assert paid == ["transfer 41", "transfer 42", "transfer 43"]


def test_a_deploy_that_changes_or_removes_the_tool_makes_no_call_and_ends_the_wait(
    till: Till, api: Api, models: ModelThread
) -> None:
    bill = ("pay", {"bill": "deploy", "eur": 3})
    models.script(
        rule("teller", calling(bill, ("lend", {"eur": 7})), {"text": "teller ends"}),
        rule("banker", calling(("transfer", {"eur": 8}), ("deposit", {"eur": 9})), {"text": "end"}),
    )
    runs = [api.submit(agent=agent, input=agent) for agent in ("teller", "banker")]
    asked = [one for run_id in runs for one in inbox(api, run_id, 2)]
    before = till.book()
    restart(till, api, TILL="v2", BANK="v2")
    try:
        for one in asked:
            assert decide(api, one).status_code == 200
        ended = [finished(api, run_id) for run_id in runs]
        assert [run["output"] for run in ended] == ["teller ends", "end"], ended
        assert till.book() == before
        told = json.dumps([call["input"] for call in models.calls[-2:]])
        assert "Tool 'lend' not found" in told and "Tool 'deposit' not found" in told
        failed = [step for run in runs for step in api.steps(run) if step["status"] == "failed"]
        assert [step["name"] for step in failed] == ["pay", "transfer"]
        assert "account" in failed[1]["error"]["message"], failed
        for run in ended:
            check_totals(api, run)
    finally:
        restart(till, api)


def test_a_hosted_mcp_call_waits_for_consent_and_cannot_be_given_other_arguments(
    api: Api, models: ModelThread
) -> None:
    wish = {"type": "mcp_approval_request", "server_label": "remote", "name": "wipe"}
    call = {"type": "mcp_call", "id": "mcp_1", "server_label": "remote", "name": "wipe"}
    given = {"arguments": '{"disk": 1}'}
    done = {**call, **given, "output": "wiped", "error": None, "status": "completed"}
    for decision in ("approve", "reject"):
        asked_for = {"items": [{**wish, **given, "id": "mcpr_1"}]}
        models.script(queue=[asked_for, {"items": [done], "text": f"after {decision}"}])
        run_id = api.submit(agent="abroad", input="go")
        (asked,) = inbox(api, run_id)
        assert (asked["subject"], asked["arguments"]) == ("wipe", {"disk": 1})
        problem(decide(api, asked, arguments={"disk": 2}), 422, "invalid_request")
        assert len(models.calls) == 1
        assert decide(api, asked, decision).status_code == 200
        assert finished(api, run_id)["output"] == f"after {decision}"
        (answer,) = [
            x for x in models.calls[1]["input"] if x.get("type") == "mcp_approval_response"
        ]
        assert answer["approve"] is (decision == "approve")
        assert answer["approval_request_id"] == "mcpr_1"
