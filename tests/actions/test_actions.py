"""Actions fire once, through crashes, and their failure is their own."""

import asyncio
import json
from typing import Any

import anyio
import pytest

from agent_server.actions.firing import ActionFiring
from agent_server.actions.handler import Actions, ActionServices
from agent_server.actions.ssrf import GuardedHttp
from agent_server.actions.tasks import ActionTask
from agent_server.domain.base import JsonObject
from agent_server.domain.errors import InvalidRequest, TaskFailed
from agent_server.domain.plans import PlanAction
from agent_server.domain.runs import RunRequest, WaitingFor
from agent_server.domain.workflows import ToolNode
from agent_server.execution.ports import LostLease, Suspend, TaskContext
from agent_server.workflow.expressions import render
from tests.actions.conftest import LocalServer
from tests.support.mortal import Died, World, every_death

REQUEST = RunRequest(goal="g")
NODE = ToolNode(id="t1", tool="x")


def actions(pauses: list[float] | None = None, calls: list[Any] | None = None) -> Actions:
    async def sleep(seconds: float) -> None:
        if pauses is not None:
            pauses.append(seconds)

    async def call_tool(ctx: TaskContext, name: str, arguments: JsonObject, *, key: str) -> Any:
        if calls is not None:
            calls.append((name, arguments, key))
        return {"called": name}

    http = GuardedHttp(allow_private=True, timeout_s=5)
    return Actions(ActionServices(http=http, call_tool=call_tool, sleep=sleep))


def firing_on(*planned: PlanAction, output: Any = "done") -> Any:
    """A root handler that lets one task end, and the run succeed."""

    async def root(ctx: TaskContext) -> Any:
        async with ActionFiring(ctx, render, {"who": "me"}) as firing:
            firing.arm(planned)
            await firing.node_completed(NODE, "1", output)
            firing.fire("run.succeeded", output=output)
        return output

    return root


def world_of(**options: Any) -> World:
    return World(REQUEST, {"action": ActionTask(actions(**options))})


async def test_an_action_on_a_task_is_rendered_fired_and_told() -> None:
    calls: list[Any] = []
    world = world_of(calls=calls)
    planned = PlanAction(
        trigger="task.completed:t1",
        action="tool",
        parameters={
            "name": "mail",
            "arguments": {
                "to": "{{ inputs.who }}",
                "n": "{{ nodes.t1.output }}",
                "on": "{{ event.type }}",
            },
        },
    )
    await world.run(firing_on(planned, output=7))
    assert calls == [("mail", {"to": "me", "n": 7, "on": "task.completed"}, "tool/1")]
    assert world.types() == ["action.triggered", "action.completed"]
    (completed,) = world.of("action.completed")
    assert completed.output == {"called": "mail"}
    assert completed.trigger == "task.completed:t1"


@pytest.mark.parametrize(
    ("trigger", "fires"),
    [
        ("task.completed", 1),
        ("task.completed:t1", 1),
        ("task.completed:t2", 0),
        ("task.failed", 0),
        ("run.succeeded", 1),
        ("run.failed", 0),
    ],
)
async def test_a_trigger_fires_on_its_own_event_alone(trigger: str, fires: int) -> None:
    world = world_of()
    await world.run(
        firing_on(PlanAction(trigger=trigger, action="emit", parameters={"event": "e"}))
    )
    assert len(world.of("action.completed")) == fires


async def test_no_death_makes_an_action_fire_twice(local_server: LocalServer) -> None:
    local_server.say(200, {"ok": True})
    planned = PlanAction(
        trigger="task.completed",
        action="http_request",
        parameters={"method": "PUT", "url": local_server.url, "json": "{{ event.output }}"},
    )
    root = firing_on(
        planned, PlanAction(trigger="run.succeeded", action="emit", parameters={"event": "e"})
    )
    async for world, output in every_death(lambda: (world_of(), root)):
        assert output == "done"
        assert 1 <= len(local_server.seen) <= 2  # a PUT in mid-air may be repeated
        local_server.seen.clear()
        assert sorted(world.types()) == ["action.completed"] * 2 + ["action.triggered"] * 2


async def test_a_post_that_was_cut_off_waits_for_a_decision_and_is_not_sent_again(
    local_server: LocalServer,
) -> None:
    local_server.say(200, {"ok": True})
    planned = PlanAction(
        trigger="run.succeeded",
        action="http_request",
        parameters={"url": local_server.url, "json": 1},
    )
    root = firing_on(planned)
    undisturbed = world_of()
    await undisturbed.run(root)
    assert len(local_server.seen) == 1
    waited = 0
    for number in range(1, undisturbed.boundaries + 1):
        local_server.seen.clear()
        world = world_of()
        with pytest.raises(Died):
            await world.run(root, die_at=number)
        step = world.steps.get("action/1/run.succeeded", {}).get("action/1/run.succeeded/http/1")
        if step is None or step.status == "done":
            await world.run(root)
        else:
            with pytest.raises(Died):
                await world.run(root)
            assert world.suspended[0].waiting_for.kind == "reconciliation"
            waited += 1
        assert len(local_server.seen) <= 1
    assert waited


async def test_a_post_that_honours_the_key_is_sent_again_with_the_same_key(
    local_server: LocalServer,
) -> None:
    local_server.say(200, {"ok": True})
    planned = PlanAction(
        trigger="run.succeeded",
        action="http_request",
        parameters={"url": local_server.url, "json": 1, "effect": "idempotent"},
    )
    async for world, _ in every_death(lambda: (world_of(), firing_on(planned))):
        keys = {seen.headers["idempotency-key"] for seen in local_server.seen}
        local_server.seen.clear()
        assert keys == {f"{world.run_id}:action/1/run.succeeded/http/1"}
        assert len(world.of("action.completed")) == 1


@pytest.mark.parametrize("stop", ["cancelled", "suspended", "taken over", "failed"])
async def test_a_root_that_stops_takes_its_actions_along_or_waits_for_them(stop: str) -> None:
    started, go_on, ended = anyio.Event(), anyio.Event(), []

    async def slow(ctx: TaskContext) -> Any:
        started.set()
        try:
            await go_on.wait()
            ended.append("finished")
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def root(ctx: TaskContext) -> Any:
        async with ActionFiring(ctx, render) as firing:
            firing.arm([PlanAction(trigger="run.failed", action="emit", parameters={"event": "e"})])
            firing.fire("run.failed")
            await started.wait()
            if stop == "suspended":
                raise Suspend(WaitingFor(kind="review"))
            if stop == "taken over":
                raise LostLease("gone")
            if stop == "failed":
                go_on.set()
                raise TaskFailed("as it is")
            await anyio.sleep_forever()

    running = asyncio.ensure_future(World(REQUEST, {"action": slow}).run(root))
    await started.wait()
    if stop == "cancelled":
        running.cancel()
    expected = {
        "cancelled": asyncio.CancelledError,
        "suspended": Suspend,
        "taken over": LostLease,
        "failed": TaskFailed,
    }
    with pytest.raises(expected[stop]):
        await asyncio.wait_for(running, 5)
    assert ended == ["finished" if stop == "failed" else "cancelled"]


async def test_an_action_that_loses_the_lease_stops_the_root() -> None:
    async def lost(ctx: TaskContext) -> Any:
        raise LostLease("another worker has it")

    root = firing_on(PlanAction(trigger="run.succeeded", action="emit", parameters={"event": "e"}))
    with pytest.raises(LostLease):
        await World(REQUEST, {"action": lost}).run(root)


async def once(world: World, local: LocalServer, **parameters: Any) -> Any:
    parameters.setdefault("url", local.url)
    await world.run(
        firing_on(PlanAction(trigger="run.succeeded", action="http_request", parameters=parameters))
    )
    return world.events[-1]


async def test_the_answer_is_recorded_with_status_headers_and_body(
    local_server: LocalServer,
) -> None:
    local_server.say(201, {"id": 5}, etag='"x"', set_cookie="secret=1")
    event = await once(world_of(), local_server, json={"a": 1}, headers={"X-A": "b"})
    assert event.output["status"] == 201
    assert event.output["body"] == {"id": 5}
    assert event.output["headers"]["etag"] == '"x"'
    assert "set-cookie" not in event.output["headers"]
    (seen,) = local_server.seen
    assert (seen.method, json.loads(seen.body), seen.headers["x-a"]) == ("POST", {"a": 1}, "b")


async def test_a_busy_service_is_asked_again_within_bounds(local_server: LocalServer) -> None:
    local_server.say(429, None, retry_after="7")
    local_server.say(503, None)
    local_server.say(200, {"ok": 1})
    pauses: list[float] = []
    event = await once(world_of(pauses=pauses), local_server, method="PUT")
    assert event.type == "action.completed"
    assert pauses == [7.0, 1.0]


async def test_a_service_that_stays_broken_fails_the_action_after_three_tries(
    local_server: LocalServer,
) -> None:
    local_server.say(500, {"why": "broken"})
    event = await once(world_of(), local_server, method="GET")
    assert event.type == "action.failed"
    assert "answered 500" in event.error.message
    assert "broken" in event.error.hint
    assert len(local_server.seen) == 3


async def test_a_post_is_not_repeated_after_an_answer_that_may_have_had_effect(
    local_server: LocalServer,
) -> None:
    local_server.say(500, None)
    event = await once(world_of(), local_server, json=1)
    assert event.type == "action.failed"
    assert len(local_server.seen) == 1


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"method": "BREW"}, "not valid"),
        ({"headers": {"Host": "evil"}}, "'Host' is set by the server"),
        ({"json": 1, "body": "x"}, "Both 'json' and 'body'"),
        ({"url": "{{ nodes.nobody.output }}"}, "nobody"),
        ({"url": "http://user:pw@127.0.0.1/"}, "user name or a password"),
        ({"body": "x", "unknown": 1}, "unknown"),
    ],
)
async def test_bad_parameters_fail_the_action_and_not_the_run(
    local_server: LocalServer, parameters: JsonObject, message: str
) -> None:
    event = await once(world_of(), local_server, **parameters)
    assert event.type == "action.failed"
    assert message in event.error.message
    assert local_server.seen == []


async def test_secrets_in_headers_do_not_reach_the_ledger(local_server: LocalServer) -> None:
    local_server.say(200, None)
    world = world_of()
    await once(
        world, local_server, headers={"Authorization": "Bearer canary", "X-Api-Key": "canary"}
    )
    assert local_server.seen[0].headers["authorization"] == "Bearer canary"
    assert "canary" not in repr([s for task in world.steps.values() for s in task.values()])


def test_an_unknown_action_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InvalidRequest) as caught:
        actions().get("http_requst")
    assert "'http_request'" in (caught.value.hint or "")


def test_each_action_is_described_with_its_parameters() -> None:
    described = {entry["name"]: entry for entry in actions().describe()}
    assert set(described) == {"tool", "http_request", "emit"}
    assert all(entry["parameters"]["type"] == "object" for entry in described.values())
