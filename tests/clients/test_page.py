"""The page of clients: its versions are those that are tested, and its command works."""

import json
import re
import shlex
from pathlib import Path

from tests.clients.conftest import KEY, MODEL
from tests.clients.node_project import SOURCES
from tests.e2e.kit import curl
from tests.support.model_thread import ModelThread, rule

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")


def test_the_versions_said_to_be_tested_are_those_of_the_tests() -> None:
    pins = dict(re.findall(r'"([a-z-]+)==([\d.]+)', (ROOT / "pyproject.toml").read_text()))
    packages = json.loads((SOURCES / "package.json").read_text())["dependencies"]
    told = {
        "[`openai` for Python](#openai-for-python)": pins["openai"],
        "[`openai` for Node](#openai-for-node)": packages["openai"],
        "[Agents SDK for Python](#agents-sdk-for-python)": f"`openai-agents` {pins['openai-agents']}",
        "[LangChain](#langchain)": f"`langchain-openai` {pins['langchain-openai']}",
        "[Agents SDK for JavaScript](#agents-sdk-for-javascript)": (
            f"`@openai/agents` {packages['@openai/agents']}"
        ),
        "[Vercel AI SDK](#vercel-ai-sdk)": (
            f"`ai` {packages['ai']}, `@ai-sdk/openai` {packages['@ai-sdk/openai']}"
        ),
    }
    for client, version in told.items():
        assert f"| {client} | {version} |" in PAGE


def test_every_client_has_its_section() -> None:
    linked = re.findall(r"\(#([a-z-]+)\)", PAGE)
    headed = [title.lower().replace(" ", "-") for title in re.findall(r"^## (.+)$", PAGE, re.M)]
    assert linked == headed and len(linked) == 10


def test_the_command_for_curl_answers(base_url: str, models: ModelThread) -> None:
    models.script(rule("12", {"text": "144."}))
    [command] = re.findall(r"```sh\ncurl (.+?)```", PAGE, re.S)
    command = command.replace("\\\n", " ").replace("http://localhost:8000/v1", base_url)
    command = command.replace("agent/assistant", MODEL).replace("$KEY", KEY)
    answer = json.loads(curl(*shlex.split(command)))
    assert answer["choices"][0]["message"]["content"] == "144."
