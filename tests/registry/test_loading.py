"""Finding and loading agents from real files. Goes through ``Registry``."""

import sys
from pathlib import Path

import agents as sdk
import pytest
from agents import Agent

from agent_server.domain.errors import UnknownAgent, UnknownTool
from agent_server.registry.catalog import SERVED_TOOLS
from agent_server.registry.slugs import slug

from .conftest import MakeRegistry, Write

CLERK = """
    from agents import Agent, function_tool

    @function_tool
    def add(a: int, b: int) -> int:
        '''Add two numbers.'''
        return a + b

    clerk = Agent(name="The Clerk!", instructions="Add.", tools=[add])
"""


async def test_an_unchanged_file_named_agents_py_is_served_and_does_not_shadow_the_sdk(
    make: MakeRegistry, write: Write
) -> None:
    write("agents.py", CLERK)
    catalog = await make().load()
    assert list(catalog.agents) == ["the-clerk"]
    assert type(catalog.agent("the-clerk")) is Agent
    assert catalog.agent("The Clerk!") is catalog.agent("the-clerk")
    assert catalog.tool("add") is catalog.agent("the-clerk").tools[0]
    assert sys.modules["agents"] is sdk
    assert catalog.errors == ()
    assert not any(Path(entry) == Path(catalog.places["the-clerk"]).parent for entry in sys.path)


async def test_nothing_to_load_is_no_error(make: MakeRegistry) -> None:
    catalog = await make().load()
    assert (dict(catalog.agents), catalog.errors, catalog.version) == ({}, (), 1)
    assert set(catalog.tools) == {tool.name for tool in SERVED_TOOLS}


async def test_a_file_imports_its_siblings_as_it_would_as_a_script(
    make: MakeRegistry, write: Write
) -> None:
    write("agents.py", "from agents import Agent\nimport words\na = Agent(name=words.NAME)")
    write("words.py", "from deep.down import NAME")
    write("deep/__init__.py", "")
    write("deep/down.py", "from . import up\nNAME = up.NAME")
    write("deep/up.py", "NAME = 'From Below'")
    catalog = await make().load()
    assert catalog.errors == ()
    assert list(catalog.agents) == ["from-below"]
    assert "words" not in sys.modules and "deep" not in sys.modules


@pytest.mark.parametrize("package", [True, False])
async def test_a_folder_is_served_with_relative_absolute_and_parent_imports(
    make: MakeRegistry, write: Write, package: bool
) -> None:
    if package:
        write("team/__init__.py", "from .one import one")
    write(
        "team/one.py",
        "from agents import Agent\nfrom .tools import t\none = Agent(name='One', tools=[t])",
    )
    write(
        "team/two.py",
        "from agents import Agent\nfrom one import one\ntwo = Agent(name='Two', handoffs=[one])",
    )
    write(
        "team/three.py",
        "from agents import Agent\nfrom team.one import one\nfrom shared import N\nthree = Agent(name=N, handoffs=[one])",
    )
    write(
        "team/tools.py",
        "from agents import function_tool\n@function_tool\ndef t() -> str:\n    return 'x'",
    )
    write("shared.py", "NAME = N = 'Three'")
    write("team/_draft.py", "raise RuntimeError('not looked at')")
    write("team/test_one.py", "raise RuntimeError('not looked at')")
    catalog = await make("team").load()
    assert catalog.errors == ()
    assert set(catalog.agents) == {"one", "two", "three"}
    one = catalog.agent("one")
    assert catalog.agent("two").handoffs == [one] and catalog.agent("three").handoffs == [one]
    assert "t" in catalog.tools


async def test_two_folders_may_have_helpers_of_the_same_name(
    make: MakeRegistry, write: Write
) -> None:
    for side in ("left", "right"):
        write(
            f"{side}/bot.py",
            "from agents import Agent\nfrom tools import NAME\nbot = Agent(name=NAME)",
        )
        write(f"{side}/tools.py", f"NAME = {side!r}")
    catalog = await make("left,right/bot.py").load()
    assert catalog.errors == ()
    assert list(catalog.agents) == ["left", "right"]


async def test_an_import_inside_a_tool_finds_the_sibling_at_run_time(
    make: MakeRegistry, write: Write
) -> None:
    write(
        "agents.py",
        "from agents import Agent\ndef late():\n    import helper\n    return helper.N\na = Agent(name='a', instructions=lambda c, a: late())",
    )
    write("helper.py", "N = 'late'")
    catalog = await make().load()
    assert await catalog.agent("a").get_system_prompt(None) == "late"  # type: ignore[arg-type]


async def test_a_module_below_the_working_folder_and_an_installed_one_are_served(
    make: MakeRegistry, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("work/__init__.py", "")
    write("work/desk.py", "from agents import Agent\nfrom .base import N\ndesk = Agent(name=N)")
    write("work/base.py", "N = 'Desk'")
    write("lib/installed_bots.py", "from agents import Agent\nbot = Agent(name='Installed')")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    catalog = await make("work.desk, installed_bots").load()
    assert catalog.errors == ()
    assert dict(catalog.places) == {"desk": "work/desk.py", "installed": "installed_bots"}


async def test_a_missing_source_and_a_missing_module_are_named(
    make: MakeRegistry, write: Write
) -> None:
    write("ok.py", "from agents import Agent\na = Agent(name='a')")
    catalog = await make("nowhere/x.py, no_such_module_zz, ok.py").load()
    assert list(catalog.agents) == ["a"]
    texts = {error.source: error.message for error in catalog.errors}
    assert "does not exist" in texts["nowhere/x.py"]
    assert "uv pip install no_such_module_zz" in texts["no_such_module_zz"]


async def test_two_agents_of_one_slug_are_an_error_that_names_both_places(
    make: MakeRegistry, write: Write
) -> None:
    write("a.py", "from agents import Agent\nfirst = Agent(name='My Bot')")
    write(
        "b.py",
        "from agents import Agent\n\nsecond = Agent(name='my-bot')\nother = Agent(name='Other')",
    )
    catalog = await make("a.py,b.py").load()
    assert catalog.agent("my-bot").name == "My Bot"
    assert "other" in catalog.agents
    (error,) = catalog.errors
    assert (error.source, error.line) == ("b.py", 3)
    assert "'first' in a.py:2" in error.message and "my-bot" in error.message


async def test_the_same_agent_imported_elsewhere_is_one(make: MakeRegistry, write: Write) -> None:
    write("a.py", "from agents import Agent\nbot = Agent(name='Bot')\nalias = bot")
    write("b.py", "from a import bot")
    catalog = await make("b.py,a.py").load()
    assert (list(catalog.agents), catalog.errors) == (["bot"], ())


async def test_two_tools_of_one_name_are_an_error(make: MakeRegistry, write: Write) -> None:
    tool = (
        "from agents import function_tool\n@function_tool\ndef same(x: int) -> int:\n    return x"
    )
    write("a.py", tool)
    write("b.py", tool)
    (error,) = (await make("a.py,b.py").load()).errors
    assert error.source == "b.py" and error.line == 3 and "a.py:3" in error.message


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("x = 1\ndef broken(:\n", 2, "SyntaxError"),
        ("x = 1\n\nimport not_installed_zz\n", 3, "uv pip install not_installed_zz"),
        ("x = 1\ndef f():\n    return 1 / 0\nf()\n", 3, "ZeroDivisionError"),
        ("import sys\nsys.exit('bye')\n", 2, "if __name__ == '__main__':"),
        (
            "import asyncio\nasync def m():\n    raise OSError('no')\nasyncio.run(m())\n",
            3,
            "__main__",
        ),
        ("from agents.mine import x\n", 1, "`agents` is the Agents SDK"),
        ("from .gone import x\n", 1, "'gone' stands beside"),
        ("import bad_helper\n", 1, "bad_helper.py, line 1"),
        ("from agents import Agent\na = Agent(name='!!')\n", 2, "no letter or digit"),
    ],
)
async def test_a_file_that_fails_is_told_with_its_line_and_stops_no_other(
    make: MakeRegistry, write: Write, text: str, line: int, says: str
) -> None:
    write("bad_helper.py", "def (")
    write("bad.py", text)
    write("good.py", CLERK)
    catalog = await make("bad.py,good.py").load()
    assert list(catalog.agents) == ["the-clerk"]
    (error,) = catalog.errors
    assert (error.source, error.line) == ("bad.py", line)
    assert says in error.message
    assert not error.serving_last_good


async def test_a_file_that_uses_asyncio_run_is_loaded(make: MakeRegistry, write: Write) -> None:
    write(
        "agents.py",
        "import asyncio\nfrom agents import Agent\nasync def n():\n    return 'Ran'\na = Agent(name=asyncio.run(n()))",
    )
    assert list((await make().load()).agents) == ["ran"]


async def test_unknown_names_are_refused_with_the_nearest_and_the_list(
    make: MakeRegistry, write: Write
) -> None:
    write("agents.py", CLERK)
    catalog = await make().load()
    with pytest.raises(UnknownAgent) as agent:
        catalog.agent("the-clark")
    assert "'the-clark'" in agent.value.detail and "'the-clerk'" in (agent.value.hint or "")
    with pytest.raises(UnknownAgent):
        catalog.agent("The Clerk")
    with pytest.raises(UnknownTool) as tool:
        catalog.tool("calculater")
    assert "'calculator'" in (tool.value.hint or "") and "add" in (tool.value.hint or "")


async def test_agents_are_described(make: MakeRegistry, write: Write) -> None:
    write(
        "agents.py",
        """
        from agents import Agent, handoff
        from pydantic import BaseModel

        class Out(BaseModel):
            score: int

        hidden = Agent(name="Listed Too", model="m-1")
        boss = Agent(name="Boss", handoff_description="Decides.", handoffs=[handoff(hidden)],
                     tools=[Agent(name="Inner").as_tool("ask_inner", "Ask.")], output_type=Out)
        """,
    )
    catalog = await make().load()
    boss = next(info for info in catalog.describe_agents() if info.name == "boss")
    assert (boss.title, boss.description, boss.source) == ("Boss", "Decides.", "agents.py")
    assert (boss.tools, boss.handoffs) == (("ask_inner",), ("listed-too",))
    assert boss.output_schema and "score" in boss.output_schema["properties"]
    assert "inner" not in catalog.agents
    assert catalog.describe_agent("Listed Too").model == "m-1"


async def test_the_example_file_is_served(make: MakeRegistry) -> None:
    example = Path(__file__).parents[2] / "examples" / "agents.py"
    catalog = await make(str(example)).load()
    assert set(catalog.agents) == {"sales-clerk", "front-desk"}
    assert {"list_products", "price_of"} <= set(catalog.tools)
    assert catalog.errors == ()


def test_slugs_are_lower_case_with_one_dash_for_other_runs() -> None:
    assert slug("  My  Great_Agent (v2)! ") == "my-great-agent-v2"
    assert slug("äö") == ""


async def test_the_sample_file_of_the_other_tests_is_served(make: MakeRegistry) -> None:
    sample = Path(__file__).parents[1] / "support" / "agents_files" / "agents.py"
    registry = make(str(sample))
    catalog = await registry.load()
    assert set(catalog.agents) == {"clerk", "front-desk", "judge", "boss", "caller"}
    assert catalog.errors == ()
    await registry.ready(catalog.agent("caller"))
    assert "echo" in {info.name for info in registry.describe_tools()}
