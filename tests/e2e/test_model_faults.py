"""A model that misbehaves: a clear error with what to do, and no run is lost or left running."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.model_thread import ModelThread, calling, rule
from tests.support.server_process import Nursery

from .kit import RUNS, Api, House, Json, check_totals, moment, types

HELLO = {"agent": "talker", "input": "hello"}


@pytest.fixture(scope="module", params=["responses", "chat_completions"])
def house(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    nursery: Nursery,
    models: ModelThread,
) -> House:
    return House(
        tmp_path_factory.mktemp(request.param),
        nursery,
        models,
        AGENT_SERVER_OPENAI_API=request.param,
        AGENT_SERVER_MODEL_RETRIES="1",
        AGENT_SERVER_MODEL_TIMEOUT_S="0.5",
        AGENT_SERVER_MAX_TURNS="4",
    )


@pytest.fixture(scope="module")
def api(house: House) -> Iterator[Api]:
    api = house.start()
    yield api
    assert not api.unended(), "a run was left running"
    api.http.close()


def error(status: int, message: str, **headers: str) -> Json:
    return {"status": status, "error": {"message": message}, "headers": headers}


FAULTS = {
    "401": (error(401, "Incorrect API key"), 1, "model_unauthorized", "OPENAI_API_KEY"),
    "404": (error(404, "no such model"), 1, "model_error", "AGENT_SERVER_MODEL"),
    "429": (error(429, "slow down", **{"retry-after": "0"}), 2, "model_rate_limited", "rate"),
    "500": (error(500, "oops", **{"retry-after": "0"}), 2, "model_error", ""),
    "nothing": ({"fault": "empty"}, 2, "model_malformed model_error", ""),
    "silence": ({"fault": "silent"}, 2, "model_timeout", "AGENT_SERVER_MODEL_TIMEOUT_S"),
    "hang up": ({"fault": "reset", "tokens": 9}, 2, "model_error", "OPENAI_BASE_URL"),
    "half a stream": ({"fault": "half", "tokens": 9}, 2, "model_error", ""),
    "no last event": ({"fault": "cut", "tokens": 9}, 2, "model_error", ""),
    "not JSON": ({"fault": "malformed"}, 2, "model_malformed", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_lasts_fails_the_run_after_bounded_tries_and_says_why(
    api: Api, models: ModelThread, fault: str
) -> None:
    reply, tries, codes, hint = FAULTS[fault]
    models.script(default=reply)
    run = api.carry_out(**HELLO)
    assert run["status"] == "failed"
    assert run["error"]["code"] in codes.split(), run["error"]
    assert run["error"]["message"]
    if hint:
        assert hint in (run["error"]["hint"] or ""), run["error"]
    if "error" in reply:
        assert reply["error"]["message"] in run["error"]["message"]
    assert len(models.calls) == tries
    (step,) = api.steps(run["id"])
    assert (step["status"], step["attempts"]) == ("failed", tries)
    assert types(api.events(run["id"]))[-2:] == ["step.failed", "run.failed"]
    check_totals(api, run)


@pytest.mark.parametrize("fault", [name for name, case in FAULTS.items() if case[1] > 1])
def test_a_fault_that_passes_is_tried_again_and_forgotten(
    api: Api, models: ModelThread, fault: str
) -> None:
    models.script(queue=[FAULTS[fault][0]], default={"text": "here I am"})
    run = api.carry_out(**HELLO)
    assert (run["status"], run["output"]) == ("succeeded", "here I am"), run["error"]
    assert len(models.calls) == run["usage"]["model_calls"] == 2
    (step,) = api.steps(run["id"])
    assert step["attempts"] == 2
    check_totals(api, run)


def test_a_rate_limit_is_waited_for_as_long_as_it_asks(api: Api, models: ModelThread) -> None:
    models.script(queue=[error(429, "slow down", **{"retry-after": "1.3"})])
    run = api.carry_out(**HELLO)
    assert run["status"] == "succeeded"
    (step,) = api.steps(run["id"])
    took = moment(step["ended_at"]) - moment(step["started_at"])
    # Without word of the model's, a first repeat comes after less than a second.
    assert took.total_seconds() >= 1.3


def test_a_tool_that_does_not_exist_is_told_to_the_model_which_may_mend_it(
    api: Api, models: ModelThread
) -> None:
    models.script(rule("hello", calling(("no_such_tool", {})), {"text": "without, then"}))
    run = api.carry_out(**HELLO)
    assert (run["status"], run["output"]) == ("succeeded", "without, then"), run["error"]
    assert "no_such_tool" in str(models.calls[1]) and "not found" in str(models.calls[1])
    assert run["usage"]["tool_calls"] == 0
    check_totals(api, run)


def test_arguments_that_do_not_parse_are_told_to_the_model_which_may_mend_them(
    api: Api, models: ModelThread
) -> None:
    models.script(
        rule(
            "hello",
            calling(("add", '{"a": 1, ')),
            calling(("add", {"a": 1, "b": 2})),
            {"text": "3"},
        )
    )
    run = api.carry_out(**HELLO)
    assert (run["status"], run["output"]) == ("succeeded", "3"), run["error"]
    bad, good = [s for s in api.steps(run["id"]) if s["kind"] == "tool"]
    assert (bad["status"], good["status"]) == ("failed", "done")
    check_totals(api, run)


@pytest.mark.parametrize("call", [("add", '{"a": 1, '), ("no_such_tool", {})])
def test_a_model_that_never_mends_its_calls_ends_at_the_limit_of_turns(
    api: Api, models: ModelThread, call: tuple[str, Any]
) -> None:
    models.script(rule("hello", calling(call)))
    run = api.carry_out(**HELLO)
    assert (run["status"], run["error"]["code"]) == ("failed", "max_turns")
    assert "AGENT_SERVER_MAX_TURNS" in run["error"]["hint"] and len(models.calls) == 4
    check_totals(api, run)


def test_a_goal_fails_by_the_model_error_and_leaves_no_task_behind(
    api: Api, models: ModelThread
) -> None:
    models.script(default=error(401, "Incorrect API key"))
    run = api.carry_out(goal="anything")
    assert (run["status"], run["error"]["code"]) == ("failed", "model_unauthorized")
    assert len(models.calls) == 1
    check_totals(api, run)


def test_the_log_names_the_run_and_the_error_and_hides_the_key(
    house: House, api: Api, models: ModelThread
) -> None:
    models.script(default=error(401, "Incorrect API key provided: test-key"))
    run = api.carry_out(**HELLO)
    lines = [json.loads(line) for line in (house.folder / "server.log").read_text().splitlines()]
    (told,) = [x for x in lines if x["message"] == "run.failed" and x["run_id"] == run["id"]]
    assert told["level"] == "warning" and told["code"] == "model_unauthorized"
    assert "Incorrect API key" in told["error"] and "OPENAI_API_KEY" in told["hint"]
    assert "test-key" not in told["error"]


def test_the_command_line_tells_the_error_and_what_to_do(
    house: House, api: Api, models: ModelThread
) -> None:
    models.script(default=error(401, "Incorrect API key"))
    shown = house.run("run", "--agent", "talker", "hello", "--server", api.url)
    assert shown.exit_code() == 1
    assert "Incorrect API key" in shown.output and "Hint: Set OPENAI_API_KEY" in shown.output
    assert "Traceback" not in shown.output


def test_a_model_server_that_is_not_there_is_named(
    nursery: Nursery, models: ModelThread, tmp_path: Path
) -> None:
    house = House(tmp_path, nursery, models, AGENT_SERVER_MODEL_RETRIES="0")
    gone = {"OPENAI_BASE_URL": "http://127.0.0.1:1/v1"}
    shown = house.run("run", "--agent", "talker", "hello", **gone)
    assert shown.exit_code() == 1
    assert "The connection to the model failed" in shown.output
    assert "OPENAI_BASE_URL" in shown.output and "Traceback" not in shown.output
    api = house.start()
    (run,) = api.listed(RUNS)
    assert run["status"] == "failed" and not api.unended()
