"""MCP servers that a user's file names and nobody connected: real processes over stdio."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, FunctionTool, RunConfig, RunContextWrapper, Runner
from agents.testing import ScriptedModel, assistant_message, function_call

from agent_server.domain.agents import ToolEffect
from agent_server.domain.errors import ToolError
from agent_server.inference.tags import tags_of
from agent_server.registry.registry import Registry

from .conftest import MakeRegistry, Write

FILE = """
    import os
    from agents import Agent
    from agents.mcp import MCPServerStdio

    echo = MCPServerStdio(
        name="echo",
        params={"command": {PYTHON}, "args": [{ECHO}], "env": {**os.environ, "ECHO_STARTS": WHERE}},
        client_session_timeout_seconds=20,
    )
    helper = Agent(name="Helper", mcp_servers=[echo])
    desk = Agent(name="Desk", handoffs=[helper])
    boss = Agent(name="Boss", tools=[helper.as_tool("ask", "Ask.")])
    free = Agent(name="Free")
"""


@pytest.fixture
def starts(tmp_path: Path) -> Path:
    return tmp_path / "starts.txt"


@pytest.fixture
async def registry(make: MakeRegistry, write: Write, starts: Path) -> Registry:
    write("agents.py", FILE.replace("WHERE", repr(str(starts))))
    registry = make()
    assert (await registry.load()).errors == ()
    return registry


def pids(starts: Path) -> list[int]:
    return [int(line) for line in starts.read_text().split()] if starts.exists() else []


async def gone(pid: int) -> bool:
    """Wait, under a bound, until no process has this id."""

    async def look() -> None:
        while Path(f"/proc/{pid}").exists() and "Z" not in _state(pid):
            await asyncio.to_thread(os.sched_yield)

    await asyncio.wait_for(look(), 10)
    return True


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


async def hints(agent: Agent[Any], name: str) -> dict[str, Any] | None:
    """The annotations of an MCP tool as inference hands them on."""
    tools = await agent.get_all_tools(RunContextWrapper(None))
    tool = next(t for t in tools if isinstance(t, FunctionTool) and t.name == name)
    given = tool.mcp_annotations
    if given is None:
        return None
    return {"read_only": given.read_only_hint, "idempotent": given.idempotent_hint}


async def run(agent: Agent[Any], name: str, arguments: str) -> str:
    model = ScriptedModel(
        [[function_call(name, arguments, call_id="c1")], [assistant_message("done")]]
    )
    config = RunConfig(tracing_disabled=True)
    result = await Runner.run(agent.clone(model=model, handoffs=[]), "go", run_config=config)
    return str([item.to_input_item() for item in result.new_items])


@pytest.mark.parametrize("name", ["helper", "desk", "boss"])
async def test_a_server_is_connected_at_first_use_and_kept(
    registry: Registry, starts: Path, name: str
) -> None:
    agent = registry.snapshot.agent(name)
    assert pids(starts) == []
    await asyncio.gather(*(registry.ready(agent) for _ in range(5)))
    await registry.ready(registry.snapshot.agent("helper"))
    assert len(pids(starts)) == 1
    assert "echo: hi" in await run(registry.snapshot.agent("helper"), "echo", '{"text": "hi"}')
    await registry.close()
    assert await gone(pids(starts)[0])


async def test_an_agent_without_servers_starts_none(registry: Registry, starts: Path) -> None:
    await registry.ready(registry.snapshot.agent("free"))
    async with registry.connected(registry.snapshot.agent("free")):
        assert pids(starts) == []


async def test_annotations_say_what_may_be_repeated_and_policy_overrules_them(
    registry: Registry, write: Write
) -> None:
    helper = registry.snapshot.agent("helper")
    assert {info.name for info in registry.describe_tools() if info.source == "mcp"} == set()
    async with registry.connected(helper):
        assert {n: registry.effect(n, await hints(helper, n)) for n in ("echo", "put", "send")} == {
            "echo": ToolEffect.NONE,
            "put": ToolEffect.IDEMPOTENT,
            "send": ToolEffect.ONCE,
        }
        listed = {info.name: info for info in registry.describe_tools() if info.source == "mcp"}
        assert set(listed) == {"echo", "put", "send", "die"}
        assert listed["put"].effect is ToolEffect.IDEMPOTENT
        assert "key" in listed["put"].parameters["properties"]
        write("agent-server.toml", "[tools.send]\neffect = 'none'\ntimeout_s = 3\n")
        assert (await registry.reload([])).errors == ()
        said = await hints(helper, "send")
        assert (registry.effect("send", said), registry.timeout_s("send")) == (ToolEffect.NONE, 3)


async def test_a_rule_holds_what_its_server_calls_destructive_or_says_nothing_of(
    make: MakeRegistry, write: Write, starts: Path
) -> None:
    write("agents.py", FILE.replace("WHERE", repr(str(starts))))
    write("agent-server.toml", "[[approvals]]\ntags = ['destructive']\n")
    registry = make()
    await registry.load()
    helper = registry.snapshot.agent("helper")
    async with registry.connected(helper):
        tools = await helper.get_all_tools(RunContextWrapper(None))
        held = {t.name: registry.approval(t.name, tags_of(t), "Helper") is not None for t in tools}
        listed = {info.name: info for info in registry.describe_tools() if info.source == "mcp"}
    assert held == {"echo": False, "put": True, "send": True} | dict.fromkeys(
        held.keys() - {"echo", "put", "send"}, True
    )
    assert {name: info.approval for name, info in listed.items()} == held
    assert {"mcp", "mcp:echo", "read_only"} <= set(listed["echo"].tags)


async def test_a_server_that_died_is_connected_again(registry: Registry, starts: Path) -> None:
    helper = registry.snapshot.agent("helper")
    await registry.ready(helper)
    with pytest.raises(Exception, match="[Cc]losed"):
        await run(helper, "die", "{}")
    assert await gone(pids(starts)[0])
    await registry.ready(helper)
    assert "echo: back" in await run(helper, "echo", '{"text": "back"}')
    assert len(pids(starts)) == 2


async def test_a_reload_closes_the_old_server_once_no_run_holds_it(
    registry: Registry, starts: Path, tmp_path: Path
) -> None:
    old = registry.snapshot.agent("helper")
    async with registry.connected(old):
        file = tmp_path / "agents.py"
        file.write_text(file.read_text() + "\n# edited\n")
        await registry.reload([file])
        assert registry.snapshot.agent("helper") is not old
        assert "echo: still" in await run(old, "echo", '{"text": "still"}')
        (pid,) = pids(starts)
    assert await gone(pid)
    await registry.ready(registry.snapshot.agent("helper"))
    assert len(pids(starts)) == 2


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ('{"command": "no-such-command-zz"}', "no-such-command-zz"),
        (
            '{"command": {PYTHON}, "args": ["-c", "raise SystemExit(1)", "--token=s3cret"]}',
            "python",
        ),
    ],
)
async def test_a_server_that_cannot_start_is_named_with_its_command_and_reason(
    make: MakeRegistry, write: Write, params: str, says: str
) -> None:
    write(
        "agents.py",
        f"""
        from agents import Agent
        from agents.mcp import MCPServerStdio
        a = Agent(name="A", mcp_servers=[MCPServerStdio(name="broken one", params={params})])
        """,
    )
    registry = make(mcp_timeout_s=10)
    await registry.load()
    for _ in range(2):
        with pytest.raises(ToolError) as refused:
            await registry.ready(registry.snapshot.agent("a"))
        assert "'broken one'" in refused.value.detail and says in refused.value.detail
        assert refused.value.hint and "s3cret" not in refused.value.detail + refused.value.hint


async def test_a_server_that_never_answers_is_given_up_in_time(
    make: MakeRegistry, write: Write
) -> None:
    write(
        "agents.py",
        """
        from agents import Agent
        from agents.mcp import MCPServerStdio
        mute = MCPServerStdio(name="mute", client_session_timeout_seconds=None, params={
            "command": {PYTHON}, "args": ["-c", "import sys; sys.stdin.read()"]})
        a = Agent(name="A", mcp_servers=[mute])
        """,
    )
    registry = make(mcp_timeout_s=0.5)
    await registry.load()
    with pytest.raises(ToolError, match="mute"):
        await registry.ready(registry.snapshot.agent("a"))


async def test_a_server_that_the_users_own_code_connected_is_left_alone(
    registry: Registry, starts: Path
) -> None:
    helper = registry.snapshot.agent("helper")
    async with helper.mcp_servers[0]:  # type: ignore[attr-defined]
        await registry.ready(helper)
        await registry.close()
        assert "echo: mine" in await run(helper, "echo", '{"text": "mine"}')
    assert len(pids(starts)) == 1
