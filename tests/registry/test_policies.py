"""``agent-server.toml``, through the registry."""

from decimal import Decimal

import pytest

from agent_server.domain.agents import ApprovalTerms, ToolEffect
from agent_server.domain.errors import AgentsFileError
from agent_server.domain.runs import Budget, Limits

from .conftest import MakeRegistry, Write

FILE = """
    from agents import Agent, function_tool

    @function_tool
    def pay(amount: int) -> str:
        return "paid"

    @function_tool(needs_approval=True)
    def look(what: str) -> str:
        return what

    clerk = Agent(name="The Clerk", tools=[pay, look])
"""


async def test_a_policy_beside_the_file_sets_tools_and_agents(
    make: MakeRegistry, write: Write
) -> None:
    write("bots/agents.py", FILE)
    write(
        "bots/agent-server.toml",
        """
        [tools.pay]
        effect = "idempotent"
        approval = true
        timeout_s = 2.5
        [tools.look]
        approval = false
        [tools.calculator]
        timeout_s = 1
        [agents.the-clerk]
        approach = "direct"
        description = "Pays."
        budget = {max_tokens = 100}
        """,
    )
    catalog = await make("bots/agents.py").load()
    assert catalog.errors == ()
    assert catalog.effect("pay") is ToolEffect.IDEMPOTENT
    assert (catalog.timeout_s("pay"), catalog.approval("pay")) == (2.5, ApprovalTerms())
    listed = {info.name: info for info in catalog.describe_tools()}
    assert listed["pay"].approval and listed["look"].approval
    assert listed["calculator"].source == "builtin" and listed["pay"].source == "file"
    for name in ("the-clerk", "The Clerk"):
        assert catalog.agent_policy(name).budget == {"max_tokens": 100}
    info = catalog.describe_agent("the-clerk")
    assert (info.approach, info.description) == ("direct", "Pays.")


async def test_without_a_policy_a_tool_runs_once_and_decides_itself_on_approval(
    make: MakeRegistry, write: Write
) -> None:
    write("agents.py", FILE)
    catalog = await make().load()
    assert catalog.effect("pay") is ToolEffect.ONCE
    assert (catalog.timeout_s("pay"), catalog.approval("pay")) == (None, None)
    assert {i.name: i.approval for i in catalog.describe_tools()}["look"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "[tools.pay]\neffekt = 'none'\n",
            "agent-server.toml:2: [tools.pay] has an unknown key 'effekt'. Did you mean 'effect'?",
        ),
        (
            "[tools.pay]\n\neffect = 'never'\n",
            "agent-server.toml:3: [tools.pay] effect = 'never' is not valid",
        ),
        ("[tools.pay]\ntimeout_s = -1\n", "timeout_s = -1 is not valid"),
        ("[tool.pay]\n", "agent-server.toml:1: Unknown table 'tool'. Did you mean 'tools'?"),
        ("tools = 3\n", "write [tools.NAME]"),
        ("[tools]\npay = 3\n", "must be a table of"),
        (
            "[agents.the-clerk]\nbudget = {max_token = 3}\n",
            "unknown key 'max_token'. Did you mean 'max_tokens'?",
        ),
        ("x = \n", "agent-server.toml:1: Is not TOML"),
    ],
)
async def test_a_policy_that_is_not_valid_refuses_to_start_and_names_file_line_and_key(
    make: MakeRegistry, write: Write, text: str, says: str
) -> None:
    write("agents.py", FILE)
    write("agent-server.toml", text)
    with pytest.raises(AgentsFileError) as refused:
        await make().load()
    assert says in refused.value.detail


async def test_a_policy_broken_by_an_edit_keeps_the_last_good_one_and_says_so(
    make: MakeRegistry, write: Write
) -> None:
    write("agents.py", FILE)
    policy = write("agent-server.toml", "[tools.pay]\napproval = true\n")
    registry = make()
    await registry.load()
    policy.write_text("[tools.pay]\naproval = false\n")
    catalog = await registry.reload([policy])
    (error,) = catalog.errors
    assert error.serving_last_good and "'approval'" in error.message
    assert catalog.approval("pay") is not None
    policy.write_text("[tools.pay]\napproval = false\n")
    catalog = await registry.reload([policy])
    assert catalog.errors == () and registry.approval("pay") is None


async def test_names_that_nothing_has_are_warned_about(make: MakeRegistry, write: Write) -> None:
    write("agents.py", FILE)
    write("agent-server.toml", "[tools.pya]\neffect = 'none'\n[agents.clark]\napproach = 'x'\n")
    catalog = await make().load()
    assert ["clark" in e.message or "pya" in e.message for e in catalog.errors] == [True, True]
    assert list(catalog.agents) == ["the-clerk"]


async def test_a_tool_inside_an_agent_is_not_taken_for_a_built_in_of_its_name(
    make: MakeRegistry, write: Write
) -> None:
    write(
        "agents.py",
        """
        from agents import Agent, function_tool

        def calculator(expression: str) -> str:
            return expression

        a = Agent(name="A", tools=[function_tool(calculator)])
        """,
    )
    registry = make()
    await registry.load()
    assert registry.effect("calculator") is ToolEffect.ONCE
    assert registry.effect("current_time") is ToolEffect.NONE
    assert registry.effect("current_time", {"read_only": None, "idempotent": True}) is (
        ToolEffect.IDEMPOTENT
    )


async def test_limits_and_prices_stand_in_the_policy_file_and_follow_its_edits(
    make: MakeRegistry, write: Write
) -> None:
    write("agents.py", FILE)
    write(
        "agent-server.toml",
        """
        [limits.keys.ann]
        default = {max_tokens = 100}
        maximum = {max_cost_usd = "2.5"}
        [limits.tenants.default]
        maximum = {max_model_calls = 9}
        [prices."my/model"]
        input_per_mtok = 0.5
        output_per_mtok = 1.5
        """,
    )
    catalog = await make().load()
    assert catalog.errors == ()
    ann = Limits(default=Budget(max_tokens=100), maximum=Budget(max_cost_usd=Decimal("2.5")))
    everybody = Limits(maximum=Budget(max_model_calls=9))
    assert list(catalog.limits("default", "ann").values()) == [ann, everybody]
    [where] = catalog.limits("default", "bob")
    assert where == "[limits.tenants.default] in agent-server.toml"
    assert catalog.policies.prices["my/model"].output_per_mtok == Decimal("1.5")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[limits.key.ann]\nmaximum = {}", "Unknown table 'limits.key'. Did you mean 'keys'"),
        ("[limits.keys.ann]\nmost = {}", "unknown key 'most'"),
        ("[limits.keys.ann]\nmaximum = {max_token = 1}", "Did you mean 'max_tokens'"),
        ("[limits.tenants.t]\ndefault = {max_tokens = -1}", "max_tokens = -1 is not valid"),
        ("[limits]\nkeys = 3", "'limits.keys' must be a table"),
        ("[prices.m]\ninput_per_mtok = -1\noutput_per_mtok = 1", "input_per_mtok = -1"),
        ("[prices.m]\ninput_per_mtok = 1", "output_per_mtok"),
    ],
)
async def test_limits_and_prices_that_make_no_sense_are_named(
    make: MakeRegistry, write: Write, text: str, says: str
) -> None:
    write("agents.py", FILE)
    write("agent-server.toml", text)
    with pytest.raises(AgentsFileError) as refused:
        await make().load()
    assert says in str(refused.value)
