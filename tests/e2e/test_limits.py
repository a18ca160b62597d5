"""Limits of tools, agents and providers, over two servers of one PostgreSQL."""

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from tests.support.model_thread import ModelThread, calling, rule
from tests.support.postgres import PostgresServer
from tests.support.server_process import Nursery

from .kit import RUNS, Api, House, check_totals, moment, types

AGENTS = """
import os, time
from agents import Agent, function_tool

def note(name, what):
    with open(os.environ["MARKS"], "a") as file:
        file.write(f"{name} {what}\\n")

@function_tool
def press(n: int) -> int:
    note("press", "in")
    time.sleep(0.05)
    note("press", "out")
    return n

@function_tool
def hum(n: int) -> int:
    note("hum", "in")
    time.sleep(0.05)
    note("hum", "out")
    return n

clerk = Agent(name="clerk", tools=[hum])
talker = Agent(name="talker")
"""
POLICY = """
[tools.press]
max_concurrent = 1
[agents.clerk]
max_concurrent = 1
"""
WAIT = ("run.waiting", "run.resumed")
RATES = '{"test-model": {"requests_per_minute": 1}}'


@pytest.fixture(scope="module")
def house(
    tmp_path_factory: pytest.TempPathFactory,
    nursery: Nursery,
    models: ModelThread,
    postgres_server: PostgresServer,
) -> House:
    folder: Path = tmp_path_factory.mktemp("limits")
    (folder / "agents.py").write_text(AGENTS)
    (folder / "agent-server.toml").write_text(POLICY)
    return House(
        folder,
        nursery,
        models,
        AGENT_SERVER_DATABASE_URL=postgres_server.fresh_database(),
        AGENT_SERVER_AGENTS=str(folder / "agents.py"),
        MARKS=str(folder / "marks"),
    )


@pytest.fixture(scope="module")
def pair(house: House) -> Iterator[tuple[Api, Api]]:
    pair = house.start(), house.start()
    yield pair
    for api in pair:
        api.http.close()
        assert api.server is not None
        api.server.stop()


def marks(house: House, name: str) -> list[str]:
    lines = (house.folder / "marks").read_text().splitlines()
    return [line.split()[1] for line in lines if line.split()[0] == name]


def test_a_tool_s_limit_holds_over_servers(house: House, pair: tuple[Api, Api]) -> None:
    flow = {
        "name": "presses",
        "nodes": [
            {
                **{"id": "each", "type": "map", "over": "[1, 2, 3]", "as": "n"},
                "nodes": [
                    {"id": "p", "type": "tool", "tool": "press", "arguments": {"n": "{{ n }}"}}
                ],
            }
        ],
        "output": "{{ nodes.each.output }}",
    }
    ids = [api.submit(workflow=flow) for api in pair * 2]
    for run_id in ids:
        run = pair[0].ended(run_id)
        assert (run["status"], run["output"]) == ("succeeded", [1, 2, 3]), run
    assert marks(house, "press") == ["in", "out"] * 12


def test_an_agent_s_limit_holds_over_servers(
    house: House, pair: tuple[Api, Api], models: ModelThread
) -> None:
    models.script(rule("hello", calling(("hum", {"n": 1})), {"text": "hummed"}))
    ids = [api.submit(agent="clerk", input="hello") for api in pair * 3]
    for run_id in ids:
        assert pair[0].ended(run_id)["output"] == "hummed"
    assert marks(house, "hum") == ["in", "out"] * 6


def test_a_provider_that_says_when_is_asked_again_then_and_the_wait_is_seen(
    pair: tuple[Api, Api], models: ModelThread
) -> None:
    slow = {"status": 429, "error": {"message": "slow down"}, "headers": {"retry-after": "3"}}
    models.script(queue=[slow], default={"text": "here I am"})
    api = pair[0]
    run_id = api.submit(agent="talker", input="hello")
    run = api.ended(run_id)
    if run["status"] == "waiting":
        assert (
            run["waiting_for"]["kind"] == "timer" and "rate limit" in run["waiting_for"]["detail"]
        )
    for _ in range(40):
        run = api.get(f"{RUNS}/{run_id}", wait=1)
        if run["status"] == "succeeded":
            break
    assert (run["status"], run["output"]) == ("succeeded", "here I am"), run
    said = types(api.events(run_id))
    assert said.count("run.waiting") == said.count("run.resumed") == 1
    assert "step.failed" not in said and "run.failed" not in said
    waited, resumed = (event for event in api.events(run_id) if event["type"] in WAIT)
    assert moment(resumed["at"]) - moment(waited["at"]) >= timedelta(seconds=2.9)
    check_totals(api, run)


def test_a_rate_is_shared_by_all_servers(house: House, models: ModelThread) -> None:
    models.script(default={"text": "here I am"})
    pair = [house.start(AGENT_SERVER_MODEL_RATES=RATES) for _ in range(2)]
    first = pair[0].submit(agent="talker", input="hello")
    assert pair[0].ended(first)["status"] == "succeeded"
    second = pair[1].submit(agent="talker", input="hello")
    run = pair[1].ended(second)
    assert run["status"] == "waiting" and run["waiting_for"]["kind"] == "timer", run
    until = datetime.fromisoformat(run["waiting_for"]["until"].replace("Z", "+00:00"))
    left = (until - datetime.now(timezone.utc)).total_seconds()
    assert 20 < left <= 61, left
    assert len(models.calls) == 1
    pair[0].http.post(f"{RUNS}/{second}/cancel")
    for api in pair:
        api.http.close()
        assert api.server is not None
        api.server.stop()
