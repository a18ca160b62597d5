"""The workflow patterns of van der Aalst and others: each that ``docs/patterns.md`` says is there,
through the API of a real server, and the page against this file."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import pytest_asyncio

from agent_server.client import AgentServerClient
from agent_server.domain.errors import InvalidWorkflow
from agent_server.domain.runs import Run
from agent_server.workflow.source import read_source
from tests.api import gates
from tests.workflow.kit import serving

pytestmark = pytest.mark.asyncio(loop_scope="module")
PAGE = (Path(__file__).parents[2] / "docs" / "patterns.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d+) \| ([^|]+) \| (yes|partly|no) \| ([^|]+) \|([^|]*)\|$", PAGE, re.M)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AgentServerClient]:
    async with serving(tmp_path_factory.mktemp("patterns")) as (client, _):
        yield client


@pytest_asyncio.fixture(loop_scope="module")
async def gate() -> AsyncIterator[gates.Gate]:
    """Where the tool ``hold`` waits."""
    made = gates.Gate()
    gates.current.append(made)
    yield made
    gates.current.pop()


async def start(client: AgentServerClient, text: str, **variables: Any) -> Run:
    workflow = read_source("name: pattern\n" + text).data
    return await client.runs.create(workflow=workflow, variables=variables or None)


async def done(client: AgentServerClient, run: Run) -> Run:
    ended = await client.runs.wait(run.id, timeout_s=30)
    assert ended.status.value == "succeeded", ended.error
    return ended


async def output(client: AgentServerClient, text: str, **variables: Any) -> Any:
    return (await done(client, await start(client, text, **variables))).output


async def told(client: AgentServerClient, run: Run) -> list[str]:
    """``started a``, ``completed a``, …: what happened to the tasks, in order."""
    events = await client.runs.stored_events(run.id)
    return [
        f"{e.type.removeprefix('task.')} {getattr(e, 'node', '')}"
        for e in events
        if e.type.startswith("task.")
    ]


async def until(client: AgentServerClient, run: Run, *wanted: str) -> None:
    """Returns when all of ``wanted`` has happened."""
    missing = set(wanted)
    with anyio.fail_after(15):
        async for event in client.runs.events(run.id):
            missing.discard(f"{event.type.removeprefix('task.')} {getattr(event, 'node', '')}")
            if not missing:
                return


async def states(client: AgentServerClient, run: Run) -> dict[str, str]:
    return {task.node: task.status for task in await client.runs.tasks(run.id)}


async def signal(client: AgentServerClient, run: Run, name: str, payload: Any) -> None:
    answer = await client._http.post(f"/api/v1/runs/{run.id}/signals/{name}", json=payload)
    assert answer.status_code == 202, answer.text


def echo(name: str, value: str = "", more: str = "") -> str:
    return f"{{id: {name}, type: tool, tool: echo, arguments: {{value: '{value or name}'}}{more}}}"


HOLD = "{id: held, type: tool, tool: hold}"


# Basic control flow


async def test_sequence(client: AgentServerClient) -> None:
    run = await start(client, f"nodes: [{echo('a')}, {echo('b')}, {echo('c')}]")
    await done(client, run)
    expected = [f"{what} {node}" for node in "abc" for what in ("started", "completed")]
    assert await told(client, run) == expected


async def test_parallel_split_and_synchronization(
    client: AgentServerClient, gate: gates.Gate
) -> None:
    text = (
        f"nodes:\n  - {{id: split, type: parallel, branches: [[{HOLD}], [{echo('a')}]]}}\n"
        f"  - {echo('after')}"
    )
    run = await start(client, text)
    await until(client, run, "started held", "completed a")
    assert "started after" not in await told(client, run)
    gate.open.set()
    await done(client, run)
    assert (await told(client, run))[-1] == "completed after"


async def test_split_and_synchronization_by_dependencies(client: AgentServerClient) -> None:
    text = (
        "nodes:\n  - {id: join, type: set, depends_on: [a, b], "
        "variables: {x: '{{ nodes.a.output + nodes.b.output }}'}}\n"
        f"  - {echo('a', more=', depends_on: []')}\n  - {echo('b', more=', depends_on: []')}\n"
        "output: '{{ vars.x }}'"
    )
    assert await output(client, text) == "ab"


CHOICE = (
    "inputs: {properties: {n: {type: integer}}}\nvariables: {way: none, times: 0}\nnodes:\n"
    "  - {id: choice, type: branch, cases: [\n"
    "      {when: inputs.n > 9, nodes: [{id: big, type: set, variables: {way: big}}]},\n"
    "      {when: inputs.n > 5, nodes: [{id: mid, type: set, variables: {way: mid}}]}],\n"
    "    else: [{id: low, type: set, variables: {way: low}}]}\n"
    "  - {id: merged, type: set, variables: {times: '{{ vars.times + 1 }}'}}\n"
    "output: ['{{ vars.way }}', '{{ vars.times }}']"
)


async def test_exclusive_choice_and_simple_merge(client: AgentServerClient) -> None:
    assert [await output(client, CHOICE, n=n) for n in (10, 6, 1)] == [
        ["big", 1],
        ["mid", 1],
        ["low", 1],
    ]


# Advanced branching


MULTI = (
    "inputs: {properties: {n: {type: integer}}}\nnodes:\n"
    "  - {id: choice, type: branch, choose: all, cases: [\n"
    f"      {{when: inputs.n > 1, nodes: [{echo('one')}]}},\n"
    f"      {{when: inputs.n > 2, nodes: [{echo('two')}]}},\n"
    f"      {{when: inputs.n > 3, nodes: [{echo('three')}]}}]}}\n"
    "output: '{{ nodes.choice.output }}'"
)


async def test_multi_choice_and_structured_synchronizing_merge(client: AgentServerClient) -> None:
    assert await output(client, MULTI, n=3) == ["one", "two"]
    assert await output(client, MULTI, n=9) == ["one", "two", "three"]


async def test_multi_merge_as_a_workflow_that_each_branch_calls(client: AgentServerClient) -> None:
    call = "{{id: {0}, type: workflow, workflow: next, input: {{by: {0}}}}}"
    text = (
        f"workflows: {{next: {{name: next, nodes: [{echo('follows', '{{ inputs.by }}')}]}}}}\n"
        f"nodes: [{{id: p, type: parallel, branches: [[{call.format('x')}], [{call.format('y')}]]}}]"
    )
    run = await start(client, text)
    assert (await done(client, run)).output == ["x", "y"]
    assert (await told(client, run)).count("completed follows") == 2


async def test_cancelling_discriminator(client: AgentServerClient, gate: gates.Gate) -> None:
    text = f"nodes: [{{id: p, type: parallel, join: any, branches: [[{HOLD}], [{echo('a')}]]}}]"
    run = await start(client, text)
    assert (await done(client, run)).output == "a"
    assert (await states(client, run)).get("held", "cancelled") == "cancelled"


async def test_cancelling_partial_join(client: AgentServerClient, gate: gates.Gate) -> None:
    branches = f"[[{HOLD}], [{echo('a')}], [{echo('b')}]]"
    text = f"nodes: [{{id: p, type: parallel, first: 2, branches: {branches}}}]"
    run = await start(client, text)
    assert sorted((await done(client, run)).output) == ["a", "b"]
    assert (await states(client, run)).get("held", "cancelled") == "cancelled"


async def test_acyclic_synchronizing_merge(client: AgentServerClient) -> None:
    text = (
        "inputs: {properties: {n: {type: integer}}}\nnodes:\n"
        f"  - {echo('a', more=', depends_on: [], when: inputs.n > 0')}\n"
        f"  - {echo('b', more=', depends_on: []')}\n"
        "  - {id: join, type: set, depends_on: [a, b], variables: {x: '{{ nodes.a.status }}'}}\n"
        "output: '{{ vars.x }}'"
    )
    assert await output(client, text, n=1) == "succeeded"
    assert await output(client, text, n=0) == "skipped"


# Iteration and termination


async def test_structured_loop(client: AgentServerClient) -> None:
    text = (
        "variables: {n: 0}\nnodes:\n"
        "  - {id: loop, type: loop, while: vars.n < 4, max_iterations: 9, nodes: [\n"
        "      {id: inc, type: set, variables: {n: '{{ vars.n + 1 }}'}}]}\n"
        "  - {id: again, type: loop, until: vars.n > 6, max_iterations: 9, nodes: [\n"
        "      {id: more, type: set, variables: {n: '{{ vars.n + 1 }}'}}]}\n"
        "output: '{{ vars.n }}'"
    )
    assert await output(client, text) == 7


async def test_implicit_termination(client: AgentServerClient, gate: gates.Gate) -> None:
    text = (
        "nodes:\n  - {id: held, type: tool, tool: hold, depends_on: []}\n"
        f"  - {echo('a', more=', depends_on: []')}"
    )
    run = await start(client, text)
    await until(client, run, "completed a", "started held")
    assert not (await client.runs.get(run.id)).status.ended
    gate.open.set()
    await done(client, run)


async def test_arbitrary_cycles_and_recursion_are_refused(client: AgentServerClient) -> None:
    text = (
        "nodes:\n  - {id: a, type: set, depends_on: [b], variables: {x: 1}}\n"
        "  - {id: b, type: set, depends_on: [a], variables: {x: 1}}"
    )
    with pytest.raises(InvalidWorkflow, match="a cycle: a → b → a"):
        await start(client, text)
    call = "nodes: [{id: s, type: workflow, workflow: me}]"
    with pytest.raises(InvalidWorkflow, match="calls itself"):
        await start(client, f"workflows: {{me: {{name: me, {call}}}}}\n{call}")


# Multiple instances


async def test_instances_that_nothing_waits_for(
    client: AgentServerClient, gate: gates.Gate
) -> None:
    text = (
        f"nodes:\n  - {{id: spawn, type: map, over: '[1, 2]', depends_on: [], nodes: [{HOLD}]}}\n"
        f"  - {echo('a', more=', depends_on: []')}\n  - {echo('b', more=', depends_on: [a]')}"
    )
    run = await start(client, text)
    await until(client, run, "completed b", "started held")
    assert "completed held" not in await told(client, run)
    gate.open.set()
    await done(client, run)


async def test_instances_known_at_design_time_and_at_run_time(client: AgentServerClient) -> None:
    body = "nodes: [{id: plus, type: tool, tool: add, arguments: {a: '{{ item }}', b: 1}}]"
    fixed = f"nodes: [{{id: m, type: map, over: [1, 2, 3], {body}}}]"
    assert await output(client, fixed) == [2, 3, 4]
    found = (
        "inputs: {properties: {items: {type: array}}}\n"
        f"nodes: [{{id: m, type: map, over: inputs.items, max_parallel: 2, {body}}}]"
    )
    assert await output(client, found, items=[5, 6]) == [6, 7]
    assert await output(client, found, items=[]) == []


async def test_instances_whose_number_shows_while_they_run_one_after_another(
    client: AgentServerClient,
) -> None:
    text = (
        "variables: {todo: [3, 2], got: []}\nnodes:\n"
        "  - {id: each, type: loop, while: 'len(vars.todo) > 0', max_iterations: 20, nodes: [\n"
        "      {id: work, type: tool, tool: add, arguments: {a: '{{ vars.todo[0] }}', b: -1}},\n"
        "      {id: note, type: set, variables: {got: '{{ vars.got + [nodes.work.output] }}',\n"
        "        todo: '{{ vars.todo[1:] + ([nodes.work.output] if nodes.work.output > 1 else [])"
        " }}'}}]}\n"
        "output: '{{ vars.got }}'"
    )
    assert await output(client, text) == [2, 1, 1]


# State-based


async def test_deferred_choice(client: AgentServerClient) -> None:
    wait = "{{id: on-{0}, type: wait, signal: {0}}}"
    branches = f"[[{wait.format('yes')}], [{wait.format('no')}], [{{id: late, type: wait, duration_s: 3600}}]]"
    run = await start(
        client, f"nodes: [{{id: p, type: parallel, join: any, branches: {branches}}}]"
    )
    await signal(client, run, "no", {"why": "rain"})
    assert (await done(client, run)).output == {"why": "rain"}
    assert set((await states(client, run)).values()) == {"succeeded", "cancelled"}


async def test_interleaved_routing(client: AgentServerClient) -> None:
    branches = f"[[{echo('a')}, {echo('b')}], [{echo('c')}], [{echo('d')}]]"
    text = f"nodes: [{{id: p, type: parallel, max_parallel: 1, branches: {branches}}}]"
    run = await start(client, text)
    await done(client, run)
    happened = await told(client, run)
    pairs = list(zip(happened[::2], happened[1::2], strict=True))
    assert all(x.split()[1] == y.split()[1] and x[0] == "s" and y[0] == "c" for x, y in pairs)


async def test_milestone(client: AgentServerClient) -> None:
    late = "[{{id: over, type: wait, duration_s: {0}}}, {{id: passed, type: set, variables: {{did: false}}}}]"
    act = (
        "[{id: reached, type: wait, signal: reached}, {id: act, type: set, variables: {did: true}}]"
    )
    text = "variables: {{did: null}}\nnodes: [{{id: p, type: parallel, join: any, branches: [{0}, {1}]}}]\noutput: '{{{{ vars.did }}}}'"
    run = await start(client, text.format(act, late.format(3600)))
    await signal(client, run, "reached", None)
    assert (await done(client, run)).output is True
    assert await output(client, text.format(act, late.format(0))) is False


async def test_persistent_trigger(client: AgentServerClient, gate: gates.Gate) -> None:
    run = await start(client, f"nodes: [{HOLD}, {{id: w, type: wait, signal: go}}]")
    await asyncio.wait_for(gate.reached.wait(), 10)
    await signal(client, run, "go", 7)
    gate.open.set()
    assert (await done(client, run)).output == 7


# Cancellation


async def test_cancel_task(client: AgentServerClient, gate: gates.Gate) -> None:
    text = "nodes: [{id: held, type: tool, tool: hold, timeout_s: 0.3, on_error: continue}, %s]"
    run = await start(client, text.replace("%s", echo("after")))
    assert (await done(client, run)).output == "after"
    await asyncio.wait_for(gate.cancelled.wait(), 10)


async def test_cancel_region(client: AgentServerClient, gate: gates.Gate) -> None:
    region = f"{{id: r, type: parallel, timeout_s: 0.3, on_error: continue, branches: [[{HOLD}], [{echo('a')}]]}}"
    run = await start(client, f"nodes: [{region}, {echo('after')}]")
    assert (await done(client, run)).output == "after"
    await asyncio.wait_for(gate.cancelled.wait(), 10)


async def test_cancel_multiple_instances(client: AgentServerClient, gate: gates.Gate) -> None:
    body = (
        "{id: b, type: branch, cases: [{when: index == 0, nodes: [{id: bad, type: tool, tool: broken}]}], "
        f"else: [{HOLD}]}}"
    )
    text = f"nodes: [{{id: m, type: map, over: [1, 2], on_error: continue, nodes: [{body}]}}, {echo('after')}]"
    run = await start(client, text)
    assert (await done(client, run)).output == "after"
    assert (await states(client, run)).get("held", "cancelled") == "cancelled"


async def test_cancel_case(client: AgentServerClient, gate: gates.Gate) -> None:
    run = await start(client, f"nodes: [{HOLD}, {echo('never')}]")
    await asyncio.wait_for(gate.reached.wait(), 10)
    assert (await client.runs.cancel(run.id)).status.value == "cancelled"
    await asyncio.wait_for(gate.cancelled.wait(), 10)
    assert "started never" not in await told(client, run)


# The page


async def test_the_page_has_every_pattern_once_and_its_tests_are_these() -> None:
    numbers = [int(number) for number, *_ in ROWS]
    assert numbers == list(range(1, 44))
    here = {name for name in globals() if name.startswith("test_")}
    here.remove("test_the_page_has_every_pattern_once_and_its_tests_are_these")
    named: set[str] = set()
    for _, pattern, supported, how, tests in ROWS:
        found = set(re.findall(r"`(test_\w+)`", tests))
        assert found <= here, (pattern, found - here)
        assert bool(found) or supported == "no", pattern
        assert how.strip(), pattern
        named |= found
    assert named == here
