"""A served world with four keys, and one tenant's data in it, planted for the others to reach for.

Leans on the kit of ``e2e``. Everything that is planted holds the word ``SECRET``.
"""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from agent_server.server import create_app
from agent_server.settings import Settings
from tests.e2e.kit import Api, House, Json
from tests.support.model_thread import ModelThread, calling, rule
from tests.support.server_process import Nursery

from .statements import SECRET

ANY_DATABASE = pytest.mark.parametrize("world", ["sqlite"], indirect=True, scope="session")
"""On tests of what is decided before a database is asked."""
OPERATOR = "operator-canary-6b1f"
PROVIDER = "provider-canary-93ae"
EMBEDDER = "embedder-canary-57cc"
KEYS = {
    "ann": ("acme", "ann-canary-1d20"),
    "amy": ("acme", "amy-canary-88f3"),
    "bob": ("globex", "bob-canary-0c4e"),
    "eve": ("void", "eve-canary-e71a"),
}
"""By name: the tenant and the key. Nobody writes anything as eve."""
CANARIES = (OPERATOR, PROVIDER, EMBEDDER, *(key for _, key in KEYS.values()))
APPROVALS, WORKFLOWS = "/api/v1/approvals", "/api/v1/workflows"
MEMORIES, RUNS = "/api/v1/memories", "/api/v1/runs"
POLICY = """
[tools.pay]
approval = true
[tools.gift.approval]
approvers = ["amy"]
"""
PLAN = {"tasks": [{"id": "a", "description": f"find the {SECRET}", "agent": "clerk"}]}


class World(House):
    """The house, its server as the operator (``api``) and as each holder of a key sees it."""

    def __init__(self, folder: Path, nursery: Nursery, models: ModelThread, **env: str) -> None:
        folder.mkdir(parents=True)
        agents = folder / "agents_served.py"
        agents.write_text((Path(__file__).parent / "agents_served.py").read_text())
        (folder / "agent-server.toml").write_text(POLICY)
        self._book = folder / "book.txt"
        self._book.touch()
        keys = {name: {"tenant": tenant, "key": key} for name, (tenant, key) in KEYS.items()}
        own = {
            "AGENT_SERVER_AGENTS": str(agents),
            "AGENT_SERVER_API_KEY": OPERATOR,
            "AGENT_SERVER_TENANT_KEYS": json.dumps(keys),
            "AGENT_SERVER_EMBEDDER_API_KEY": EMBEDDER,
            "AGENT_SERVER_MAX_STREAMS_PER_KEY": "3",
            "AGENT_SERVER_MAX_RUN_NODES": "60",
            "AGENT_SERVER_MODEL_RETRIES": "0",
            "AGENT_SERVER_LOG_LEVEL": "DEBUG",
            "AGENT_SERVER_LOG_FORMAT": "json",
            "AGENT_SERVER_ACCESS_LOG": "true",
            "COUNT_FILE": str(self._book),
            "STATEMENTS_FILE": str(folder / "statements.sql"),
            "OPENAI_API_KEY": PROVIDER,
        }
        super().__init__(folder, nursery, models, **own, **env)
        self.api = self._as(self.start(), OPERATOR)
        self.ann, self.amy, self.bob, self.eve = (
            self._as(Api(self.api.url), KEYS[name][1]) for name in ("ann", "amy", "bob", "eve")
        )

    def _as(self, api: Api, key: str) -> Api:
        api.http.headers["authorization"] = f"Bearer {key}"
        return api

    def close(self) -> None:
        for api in (self.ann, self.amy, self.bob, self.eve):
            api.http.close()
        assert self.api.server is not None
        asyncio.run(self.api.server.kill())
        self.api.http.close()

    def book(self) -> list[str]:
        return self._book.read_text().splitlines()

    def statements(self) -> list[str]:
        """What ``statements.watch`` wrote down."""
        return (self.folder / "statements.sql").read_text().splitlines()

    @property
    def log(self) -> str:
        return (self.folder / "server.log").read_text()

    @cached_property
    def planted(self) -> "Planted":
        """Ann's data, which nobody changes."""
        return plant(self)


@dataclass(frozen=True)
class Planted:
    """Where ann's data is: runs, and by the name of a path's parameter."""

    ended: str
    waiting: str
    review: str
    flow: str
    ids: dict[str, str]
    step: str
    """Of the run that waits."""

    def path(self, template: str) -> str:
        """``template`` with ann's ids in it, of a run that it makes sense for."""
        run = self.waiting
        if template.endswith("/plan"):
            run = self.review
        elif "/graph" in template or "/tasks/" in template:
            run = self.flow
        found = template.replace(":path}", "}").replace("/signals/{name}", "/signals/go")
        for name, value in {**self.ids, "run_id": run}.items():
            found = found.replace("{" + name + "}", value)
        return found


def definition(name: str, word: str = SECRET) -> Json:
    node = {"id": "n", "type": "tool", "tool": "calculator", "arguments": {"expression": "1 + 1"}}
    return {"name": name, "description": word, "nodes": [node], "output": word}


def plant(world: World, name: str = "flow") -> Planted:
    """Put one of everything that has an id among ann's data."""
    ann = world.ann
    world.models.script(
        rule(r"\Aask", calling(("pay", {"bill": SECRET, "eur": 3})), {"text": "paid"}),
        rule(r"\A(Goal:\n)?plan", {"text": json.dumps(PLAN)}),
        default={"text": f"the {SECRET} it is"},
    )
    session, flow = f"session-{name}-{SECRET}", f"{name}-{SECRET}"
    ended = ann.carry_out(
        agent="clerk", input=f"hello {SECRET}", session_id=session, subject=f"person-{SECRET}"
    )
    assert ended["status"] == "succeeded", ended
    waiting = ann.submit(agent="clerk", input="ask", metadata={"word": SECRET})
    assert ann.ended(waiting)["status"] == "waiting"
    (approval,) = ann.listed(APPROVALS, status="pending", run_id=waiting)
    review = ann.submit(goal="plan", review="plan")
    assert ann.ended(review)["waiting_for"]["kind"] == "review"
    made(ann, WORKFLOWS, definition(flow))
    of_flow = ann.carry_out(workflow=flow)
    assert of_flow["output"] == SECRET, of_flow
    fact = {"kind": "knowledge", "key": f"{name}/{SECRET}", "content": f"The flower is {SECRET}."}
    memory = made(ann, MEMORIES, {**fact, "subject": f"person-{SECRET}", "session_id": session})
    response = made(ann, "/v1/responses", {"model": "agent/clerk", "input": f"hello {SECRET}"})
    said = {"type": "message", "role": "user", "content": f"my {SECRET}"}
    conversation = made(ann, "/v1/conversations", {"items": [said]})["id"]
    item = ann.get(f"/v1/conversations/{conversation}/items")["data"][0]["id"]
    form = {"file": ("x.txt", SECRET.encode(), "text/plain")}
    file = ann.http.post("/v1/files", files=form, data={"purpose": "user_data"}).json()["id"]
    ids = {
        "task_id": ann.listed(f"{RUNS}/{of_flow['id']}/tasks")[0]["id"],
        "approval_id": approval["id"],
        "name": flow,
        "memory_id": memory["id"],
        "session_id": session,
        "subject": f"person-{SECRET}",
        "response_id": response["id"],
        "conversation_id": conversation,
        "item_id": item,
        "file_id": file,
        "model": f"workflow/{flow}",
    }
    return Planted(ended["id"], waiting, review, of_flow["id"], ids, ann.steps(waiting)[0]["key"])


def made(api: Api, path: str, body: Json) -> Json:
    answer = api.http.post(path, json=body)
    assert answer.is_success, answer.text
    found: Json = answer.json()
    return found


def routes() -> Iterator[tuple[str, str]]:
    """Method and path of every route of the application. WebSockets have no method."""
    app: Any = create_app(Settings(_env_file=None))  # type: ignore[call-arg]  # pydantic-settings' own
    for route in app.routes:
        for method in sorted(getattr(route, "methods", None) or ()):
            yield method, route.path


ROUTES = [(method, path) for method, path in routes() if method != "HEAD"]
"""An answer to HEAD is GET's without its body."""
WITH_IDS = [(method, path) for method, path in ROUTES if "{" in path]
