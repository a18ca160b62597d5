"""Random graphs with random failures: the same result in whatever order tasks end, and after a
crash at any boundary."""

from contextlib import suppress
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_server.domain.workflows import WorkflowDefinition
from agent_server.workflow.interpreter import NodeFailed, run_workflow
from agent_server.workflow.validation import validate

from .fake_context import Crash, FakeContext, World, tools


class _Draft:
    """Makes one random workflow out of hypothesis' choices, perhaps with races in it."""

    def __init__(self, draw: Any, racing: bool) -> None:
        self._draw = draw
        self._racing = racing
        self._ids = 0

    def _pick(self, *choices: Any) -> Any:
        return self._draw(st.sampled_from(choices))

    def nodes(self, depth: int, seen: list[str]) -> list[dict[str, Any]]:
        graph = self._draw(st.booleans())
        made: list[dict[str, Any]] = []
        for _ in range(self._draw(st.integers(1, 4))):
            depends_on = None
            visible = list(seen)
            if graph:
                depends_on = [n["id"] for n in made if self._draw(st.booleans())]
                visible += self._before(made, depends_on)
            else:
                visible += [n["id"] for n in made]
            node = self.node(depth, visible)
            if depends_on is not None:
                node["depends_on"] = depends_on
            made.append(node)
        for index, node in enumerate(made[:-1]):
            if self._draw(st.integers(0, 4)) == 0:
                node["on_error"] = made[self._draw(st.integers(index + 1, len(made) - 1))]["id"]
        return made

    def _before(self, made: list[dict[str, Any]], names: list[str]) -> list[str]:
        found = set(names)
        for node in reversed(made):
            if node["id"] in found:
                found.update(node["depends_on"])
        return sorted(found)

    def node(self, depth: int, seen: list[str]) -> dict[str, Any]:
        self._ids += 1
        id_ = f"n{self._ids}"
        kinds = ["tool", "tool", "tool", "set"]
        if depth:
            kinds += ["parallel", "branch", "map", "loop"]
        kind = self._pick(*kinds)
        node: dict[str, Any] = {"id": id_, "type": kind}
        node["on_error"] = self._pick("fail", "continue", "continue")
        if self._draw(st.integers(0, 5)) == 0:
            node["retry"] = {"max_attempts": 2, "backoff_s": self._pick(0, 1)}
        if self._draw(st.integers(0, 7)) == 0:
            node["when"] = "vars.x != 'n1'"
        if self._draw(st.integers(0, 7)) == 0:
            node["output"] = "x"
        used = self._pick(
            "vars.x", *(f"[nodes.{name}.status, nodes.{name}.output]" for name in seen)
        )
        if kind == "tool":
            node["tool"] = self._pick("echo", "echo", "echo", "fail", "fail_until")
            node["arguments"] = {"value": "{{ " + used + " }}", "attempt": 2}
        elif kind == "set":
            node["variables"] = {"x": self._pick(id_, "{{ str(vars.x) + '" + id_ + "' }}")}
        elif kind == "parallel":
            count = self._draw(st.integers(1, 3))
            node["branches"] = [self.nodes(depth - 1, seen) for _ in range(count)]
            if self._racing:
                node |= self._pick({"join": "any"}, {"first": count}, {"first": 1})
        elif kind == "branch":
            when = self._pick("vars.x == vars.x", "vars.x == 7", "len(str(vars.x)) > 2")
            node["cases"] = [{"when": when, "nodes": self.nodes(depth - 1, seen)}]
            node["cases"].append({"when": "len(str(vars.x)) < 4", "nodes": [self.node(0, seen)]})
            node["choose"] = self._pick("first", "all")
            node["else"] = self.nodes(depth - 1, seen)
        elif kind == "map":
            node["over"] = list(range(self._draw(st.integers(0, 3))))
            node["max_parallel"] = self._pick(None, 1, 2)
            node["on_item_error"] = self._pick("fail", "continue", "drop")
            if node["on_item_error"] != "fail":
                node["max_failures"] = self._pick(None, 1)
            node["nodes"] = self.nodes(depth - 1, seen)
        else:
            node["while"] = f"iteration <= {self._draw(st.integers(0, 2))}"
            node["max_iterations"] = 2
            node["nodes"] = self.nodes(depth - 1, seen)
        return node


@st.composite
def workflows(draw: Any, racing: bool = False) -> WorkflowDefinition:
    nodes = _Draft(draw, racing).nodes(2, [])
    output = {"x": "{{ vars.x }}", **{n["id"]: "{{ nodes." + n["id"] + " }}" for n in nodes}}
    return validate({"name": "w", "variables": {"x": "0"}, "nodes": nodes, "output": output})


async def _end(definition: WorkflowDefinition, ctx: FakeContext, drain: bool) -> Any:
    try:
        return await run_workflow(ctx, definition, {}, max_parallel=3, drain=drain)
    except NodeFailed as failed:
        return {
            "node": failed.node_id,
            "path": failed.path,
            "error": failed.error.message,
            "finished": failed.finished,
        }


@settings(max_examples=60, deadline=None)
@given(workflows(), st.integers(0, 2**16), st.booleans())
async def test_the_result_does_not_depend_on_who_is_faster(
    definition: WorkflowDefinition, seed: int, drain: bool
) -> None:
    first, second = World(tools), World(tools)
    one = await _end(definition, FakeContext(first), drain)
    other = await _end(definition, FakeContext(second, random=Random(seed)), drain)
    assert one == other
    if drain:  # else it depends on who is faster what was begun before it was broken off
        assert first.paths == second.paths
    for path in first.paths & second.paths:
        assert first.specs[path].payload == second.specs[path].payload


@settings(max_examples=25, deadline=None)
@given(workflows(), st.integers(0, 2**16), st.booleans())
async def test_after_a_crash_at_any_boundary_it_ends_the_same_and_repeats_nothing(
    definition: WorkflowDefinition, seed: int, drain: bool
) -> None:
    whole = World(tools)
    wanted = await _end(definition, FakeContext(whole, random=Random(seed)), drain)
    for boundary in range(len(whole.carried_out)):
        world = World(tools)
        dying = FakeContext(world, random=Random(seed), crash_after=boundary)
        with pytest.raises(Crash):
            await _end(definition, dying, drain)
        assert len(world.carried_out) == boundary
        again = await _end(definition, FakeContext(world, random=Random(seed + 1)), drain)
        assert again == wanted
        assert len(world.carried_out) == len(set(world.carried_out))
        if drain:
            assert world.paths == whole.paths


@settings(max_examples=25, deadline=None)
@given(workflows(), st.integers(0, 2**16))
async def test_replaying_a_run_that_ended_carries_nothing_out(
    definition: WorkflowDefinition, seed: int
) -> None:
    world = World(tools)
    wanted = await _end(definition, FakeContext(world, random=Random(seed)), drain=True)
    before = list(world.carried_out)
    assert await _end(definition, FakeContext(world), drain=True) == wanted
    assert world.carried_out == before


@settings(max_examples=40, deadline=None)
@given(workflows(racing=True), st.integers(0, 2**16))
async def test_who_won_is_decided_once(definition: WorkflowDefinition, seed: int) -> None:
    world = World(tools)
    wanted = await _end(definition, FakeContext(world, random=Random(seed)), drain=False)
    before = list(world.carried_out)
    assert await _end(definition, FakeContext(world), drain=False) == wanted
    assert world.carried_out == before
    for boundary in range(len(before)):
        again = World(tools)
        dying = FakeContext(again, random=Random(seed), crash_after=boundary)
        with suppress(Crash):  # A loser may be called off before it is the one that crashes.
            await _end(definition, dying, drain=False)
        decided = dict(again.values)
        await _end(definition, FakeContext(again, random=Random(seed + 1)), drain=False)
        assert len(again.carried_out) == len(set(again.carried_out))
        assert decided.items() <= again.values.items()
