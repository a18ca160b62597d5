"""Random graphs with random failures: the same result in whatever order tasks end, and after a
crash at any boundary."""

from contextlib import suppress
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_server.domain.runs import RunRequest
from agent_server.domain.workflows import WorkflowDefinition
from agent_server.workflow.failures import NodeFailed
from agent_server.workflow.interpreter import run_workflow
from agent_server.workflow.validation import validate

from .drafts import drafts
from .fake_context import WORKFLOWS, Crash, FakeContext, World, tools


def workflows(**kind: Any) -> st.SearchStrategy[WorkflowDefinition]:
    return drafts(**kind).map(validate)


def _races(definition: WorkflowDefinition) -> bool:
    """Whether something in it is broken off because something else won, or failed: what stands in a
    sub-workflow is not drained."""
    text = definition.model_dump_json()
    return any(sign in text for sign in ('"join":"any"', '"first":1', '"type":"workflow"'))


async def _end(definition: WorkflowDefinition, ctx: FakeContext, drain: bool) -> Any:
    """The output, or how it failed. With ``drain`` as plans run, else as workflows do."""
    try:
        if drain:
            return await run_workflow(ctx, definition, {}, max_parallel=3, drain=True)
        ctx.run = replace(ctx.run, request=RunRequest(workflow=definition.model_dump(mode="json")))
        return await WORKFLOWS.root(ctx)
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
    if drain and not _races(
        definition
    ):  # else it depends on who is faster what was begun before it was broken off
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
        if drain and not _races(definition):
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
