"""A house whose agents pay, and the few calls of those who consent to it.

Leans on ``kit``. Its agents are those of ``agents_files/till.py``; what they did is in its book.
"""

import asyncio
import shutil
from pathlib import Path
from typing import Any

from tests.support.model_thread import ModelThread, calling, rule
from tests.support.server_process import Nursery

from .kit import RUNS, Api, House, Json

SUPPORT = Path(__file__).parents[1] / "support"
APPROVALS = "/api/v1/approvals"
POLICY = """
[tools.pay]
approval = true
[tools.lend]
approval = true
[tools.tip.approval]
expires_s = 0.2
[tools.gift.approval]
approvers = ["the boss"]
[tools.look]
effect = "none"
"""


class Till(House):
    """A house whose agents pay; ``book`` is what they did."""

    def __init__(self, folder: Path, nursery: Nursery, models: ModelThread, **env: str) -> None:
        (folder / "agents").mkdir(parents=True)
        shutil.copy(SUPPORT / "agents_files" / "till.py", folder / "agents" / "till.py")
        (folder / "agents" / "agent-server.toml").write_text(POLICY)
        self._book = folder / "book.txt"
        self._book.touch()
        paths = {
            "AGENT_SERVER_AGENTS": str(folder / "agents" / "till.py"),
            "COUNT_FILE": str(self._book),
            "BANK_SERVER": str(SUPPORT / "mcp_bank_server.py"),
            "AGENT_SERVER_MEMORY_EXPERIENCE": "false",
        }
        super().__init__(folder, nursery, models, **paths, **env)

    def book(self, about: str = "") -> list[str]:
        return [line for line in self._book.read_text().splitlines() if about in line]


def inbox(api: Api, run_id: str, count: int = 1) -> list[Json]:
    """What the run asks for, now that it stands still for ``count`` decisions."""
    run = api.ended(run_id)
    assert run["status"] == "waiting" and run["waiting_for"]["kind"] == "approval", run
    found = api.listed(APPROVALS, status="pending", run_id=run_id)
    assert len(found) == count, found
    return sorted(found, key=lambda one: str(one["subject"]))


def finished(api: Api, run_id: str) -> Json:
    """The run at its end. One that was decided about still waits until it is taken up."""
    for _ in range(60):
        run: Json = api.get(f"{RUNS}/{run_id}", wait=0.5)
        if run["ended_at"]:
            return run
    raise AssertionError(run)


def asked_after(api: Api, decided: Json, **about: str) -> Json:
    """What the run asks for next, perhaps only ``about`` a ``subject``."""
    for _ in range(60):
        found = api.listed(APPROVALS, status="pending", run_id=decided["run_id"], **about)
        if found:
            return found[0]
        api.get(f"{RUNS}/{decided['run_id']}", wait=0.2)
    raise AssertionError("nothing was asked")


def asking(api: Api, models: ModelThread, name: str, **eur: Any) -> tuple[str, Json]:
    """A run of the teller that asks to pay the bill ``name``, and what it asks for."""
    arguments = {"bill": name, "eur": 3}
    models.script(rule(rf"\A{name}\b", calling(("pay", arguments)), {"text": f"{name} done"}))
    run_id = api.submit(agent="teller", input=name)
    return run_id, inbox(api, run_id)[0]


def restart(house: Till, api: Api, **env: str) -> None:
    """Kill the server of ``api``, and let it speak to another, of the code that ``env`` names."""
    assert api.server is not None
    asyncio.run(api.server.kill())
    api.http.close()
    again = house.start(**env)
    api.url, api.server, api.http = again.url, again.server, again.http


def decide(api: Api, approval: Json, decision: str = "approve", **more: Any) -> Any:
    return api.http.post(f"{APPROVALS}/{approval['id']}", json={"decision": decision, **more})
