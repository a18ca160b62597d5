"""What would never end, or would grow without bound, fails clearly, and names its limit."""

from typing import Any

import pytest
from sqlalchemy import Connection, Text, cast, func, select

from agent_server.domain.base import JsonObject
from agent_server.domain.ids import DEFAULT_TENANT
from agent_server.domain.runs import Run, RunStatus
from agent_server.storage.tables import blobs, events, tasks

from .workbench import Bench, bench, note


def sub(id: str, workflow: Any, **fields: Any) -> JsonObject:
    return {"id": id, "type": "workflow", "workflow": workflow, **fields}


def loop(id: str, times: int, *nodes: JsonObject) -> JsonObject:
    until = f"iteration >= {times}"
    return {"id": id, "type": "loop", "until": until, "max_iterations": times, "nodes": list(nodes)}


def over(id: str, items: int, *nodes: JsonObject) -> JsonObject:
    return {"id": id, "type": "map", "over": list(range(items)), "nodes": list(nodes)}


SET = {"id": "s", "type": "set", "variables": {"x": 1}}


async def ends(made: Bench, *nodes: JsonObject, **fields: Any) -> Run:
    """The run, of which nothing goes on."""
    run = await made.run(*nodes, **fields)
    assert not set((await made.tasks(run)).values()) & {"running", "queued", "waiting"}
    return run


async def test_a_workflow_that_calls_itself_fails_that_node_and_its_policy_is_applied(
    sqlite_url: str,
) -> None:
    async with bench(sqlite_url, Bench({"self": {"nodes": [sub("n", "self")]}})) as made:
        run = await ends(made, sub("start", "self"))
        assert run.error is not None
        assert "calls itself: w → self@1 → self@1" in run.error.message
        shown = note("z", "{{ nodes.start.error.code }}")
        run = await ends(made, sub("start", "self", on_error="continue"), shown)
        assert (run.status, run.output) == (RunStatus.SUCCEEDED, "task_failed")
        assert "workflow_limit" in await made.codes(run)


async def test_two_workflows_that_call_each_other_fail_with_the_way_they_went(
    sqlite_url: str,
) -> None:
    stored = {"ping": {"nodes": [sub("a", "pong")]}, "pong": {"nodes": [sub("b", "ping")]}}
    async with bench(sqlite_url, Bench(stored)) as made:
        run = await ends(made, sub("start", "ping"))
        assert run.error is not None
        assert "calls itself: w → ping@1 → pong@1 → ping@1" in run.error.message


async def test_workflows_stand_inside_each_other_only_so_deep(sqlite_url: str) -> None:
    stored = {f"w{n}": {"nodes": [sub("n", f"w{n + 1}")]} for n in range(20)}
    async with bench(sqlite_url, Bench(stored)) as made:
        run = await ends(made, sub("start", "w0"))
        assert run.error is not None and "More than 8 workflows" in run.error.message


@pytest.mark.parametrize("leaf", [SET, note("t")])
async def test_loops_of_maps_of_workflows_end_at_the_limit_of_the_whole_tree(
    leaf: JsonObject, url: str
) -> None:
    inner = {"name": "inner", "nodes": [loop("deep", 20, leaf)]}
    explosion = loop("l", 20, over("m", 20, sub("w", inner)))
    async with bench(url, max_run_nodes=200) as made:
        run = await ends(made, explosion)
        assert run.status is RunStatus.FAILED and run.error is not None
        assert "AGENT_SERVER_MAX_RUN_NODES" in (run.error.hint or "")
        assert len(made.calls) <= 200
        tasks = await made.runs.tasks(DEFAULT_TENANT, run.id)
        assert len([task for task in tasks if task.status != "skipped"]) <= 200


async def test_what_a_run_has_begun_is_counted_once_through_a_stop(url: str) -> None:
    nodes = [over("m", 8, note("n")), {"id": "w", "type": "wait", "signal": "go"}, note("last")]
    async with bench(url, max_run_nodes=14) as made:
        run = await made.submit(*nodes)
        while (await made.tasks(run)).get("2") != "waiting":
            await made.runs.wait(DEFAULT_TENANT, run.id, 0.05)
    async with bench(url, max_run_nodes=14) as again:
        await again.signal(run, "go", None)
        assert (await again.runs.wait(DEFAULT_TENANT, run.id, 30)).output == "last"
        assert again.calls == ["last"]


async def test_what_undoes_a_run_that_reached_its_limit_may_be_carried_out(url: str) -> None:
    undo = [note("undo", "undone {{ index }}")]
    async with bench(url, max_run_nodes=12) as made:
        run = await ends(made, over("m", 5, note("n", compensate=undo)), over("m2", 100, note("x")))
        assert run.error is not None and "AGENT_SERVER_MAX_RUN_NODES" in (run.error.hint or "")
        assert run.error.errors == ()
        assert sorted(c for c in made.calls if "undone" in c) == [f"undone {i}" for i in range(5)]


async def test_a_variable_of_ten_megabytes_fails_its_node_and_its_policy_is_applied(
    sqlite_url: str,
) -> None:
    class Large(Bench):
        async def call_tool(self, ctx: Any, name: str, arguments: JsonObject, *, key: str) -> Any:
            return "x" * 10_000_000

    node = {"id": "n", "type": "tool", "tool": "large", "output": "big"}
    async with bench(sqlite_url, Large()) as made:
        run = await ends(made, node)
        assert run.error is not None and "The variable 'big'" in run.error.message
        after = {"id": "z", "type": "set", "variables": {"how": "{{ nodes.n.status }}"}}
        run = await ends(made, {**node, "on_error": "continue"}, after)
        assert run.output == {"how": "failed"}


@pytest.mark.parametrize("made", ["x" * 2_000_000, ["y" * 100] * 15_000, ["z" * 300_000] * 5])
async def test_a_large_result_is_handed_on_by_its_name_and_stored_once(
    sqlite_url: str, made: Any
) -> None:
    class Large(Bench):
        async def call_tool(self, ctx: Any, name: str, arguments: JsonObject, *, key: str) -> Any:
            return (
                made if name == "large" else [arguments["value"] == made, arguments.get("number")]
            )

    large = {"id": "n", "type": "tool", "tool": "large"}
    passed = {"value": "{{ nodes.n.output }}", "number": "{{ item }}"}
    inner = {"id": "i", "type": "tool", "tool": "note", "arguments": passed}
    async with bench(sqlite_url, Large()) as bed:
        run = await ends(bed, large, over("m", 3, inner))
        assert run.output == [[True, number] for number in range(3)], run.error

        def sizes(connection: Connection) -> tuple[int, int, int]:
            texts = select(func.sum(func.length(cast(tasks.c.payload, Text))))
            events_size = select(func.sum(func.length(cast(events.c.data, Text))))
            kept = select(func.count()).select_from(blobs)
            found = (connection.execute(query).scalar() for query in (texts, events_size, kept))
            return tuple(int(size or 0) for size in found)  # type: ignore[return-value]

        payloads, said, kept = await bed.runs.database.read(sizes)
        assert payloads < 5_000 and said < 30_000 and kept <= 1
        again = await ends(
            bed, large, note("z", "{{ nodes.n.output }}"), output="{{ nodes.z.status }}"
        )
        assert again.output == "succeeded"
        each = {"id": "i", "type": "tool", "tool": "large"}
        if isinstance(made, list) and len(made) == 5:
            run = await ends(bed, large, {**over("m", 0, each), "over": "nodes.n.output"})
            assert run.output == [made] * 5, run.error
        made = "x" * 20_000_000
        run = await ends(bed, large, note("z", "{{ nodes.n.output }}"))
        assert run.error is not None and "16000000 characters" in run.error.message


EXPLOSIONS = ["'x' * 1000000000", "[0] * 1000000000", "9 ** 9 ** 9"]


@pytest.mark.parametrize("expression", EXPLOSIONS)
async def test_an_expression_that_would_explode_fails_its_node(
    expression: str, sqlite_url: str
) -> None:
    async with bench(sqlite_url) as made:
        node = {"id": "n", "type": "set", "variables": {"x": f"{{{{ {expression} }}}}"}}
        run = await ends(made, {**node, "on_error": "continue"}, note("z", "{{ nodes.n.error }}"))
        assert run.output["code"] == "expression_error"


async def test_a_value_that_doubles_in_a_loop_fails_when_it_is_too_large(sqlite_url: str) -> None:
    grow = {"id": "g", "type": "set", "variables": {"x": "{{ vars.x + vars.x }}"}}
    async with bench(sqlite_url) as made:
        run = await made.run(loop("l", 10_000, grow), variables={"x": "0123456789"})
        assert run.status is RunStatus.FAILED and run.error is not None
        assert "g" in run.error.message
