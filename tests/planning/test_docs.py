"""The page on plans names every approach, action, parameter, trigger and extension point."""

from pathlib import Path

from agent_server.actions.firing import RUN_EVENTS, TASK_EVENTS
from agent_server.plugins import POINTS
from agent_server.reasoning.approaches import Approaches
from tests.actions.test_actions import actions

PAGE = (Path(__file__).parents[2] / "docs" / "plans.md").read_text(encoding="utf-8")


def test_the_page_on_plans_names_everything_that_can_be_written_in_one() -> None:
    known = [*Approaches().names, *TASK_EVENTS, *RUN_EVENTS]
    for entry in actions().describe():
        known += [entry["name"], *entry["parameters"]["properties"]]
    assert [name for name in known if f"`{name}`" not in PAGE] == []
    assert [point.group for point in POINTS if point.group not in PAGE] == []
