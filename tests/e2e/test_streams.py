"""Streams that break and servers that stop in an orderly way: nothing is missed, nothing lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import httpx2
import pytest

from agent_server.client import AgentServerClient
from tests.support.cutting_proxy import CuttingProxy
from tests.support.model_thread import ModelThread, calling, rule
from tests.support.server_process import Nursery

from .kit import RUNS, Api, House, Json, check_totals, curl, parse_sse, types

TALE = rule("tale", calling(("add", {"a": 1, "b": 2})), {"tokens": 150, "delay_s": 0.002})


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery, models: ModelThread) -> House:
    return House(tmp_path_factory.mktemp("streams"), nursery, models)


@pytest.fixture(scope="module")
def api(house: House) -> Iterator[Api]:
    api = house.start()
    yield api
    api.http.close()


def cut_after(api: Api, run_id: str, last: int, events: int) -> list[Json]:
    """Follow from ``last`` on, and hang up after so many events."""
    found: list[Json] = []
    headers = {"Last-Event-ID": str(last), "Accept": "text/event-stream"}
    with api.http.stream("GET", f"{RUNS}/{run_id}/events", headers=headers) as answer:
        text = ""
        for piece in answer.iter_text():
            text += piece
            whole = text.rpartition("\n\n")[0]
            found = parse_sse(whole)
            if len(found) >= events:
                break
    return found


def test_a_stream_cut_anywhere_resumes_exactly(api: Api, models: ModelThread) -> None:
    models.script(TALE)
    run_id = api.submit(agent="talker", input="a tale")
    heard: list[Json] = []
    for cut in (1, 2, 3, 30, 1, 50):
        last = heard[-1]["seq"] if heard else 0
        said = cut_after(api, run_id, last, cut)
        heard += [event for event in said if event["_id"] is not None]
    last = str(heard[-1]["seq"])
    heard += [
        event
        for event in parse_sse(
            curl("-H", f"Last-Event-ID: {last}", f"{api.url}{RUNS}/{run_id}/events")
        )
        if event["_id"] is not None
    ]
    stored = api.events(run_id)
    assert [(e["seq"], e["type"]) for e in heard] == [(e["seq"], e["type"]) for e in stored]
    assert types(heard)[-1] == "run.succeeded"
    whole = next(e for e in heard if e["type"] == "message.completed")
    assert whole["text"].split() == [f"tok{n}" for n in range(150)]


async def test_the_client_comes_through_a_proxy_that_cuts(api: Api, models: ModelThread) -> None:
    models.script(TALE)
    run_id = api.submit(agent="talker", input="a tale")
    assert api.server is not None
    async with (
        CuttingProxy(api.server.port, [600, 600, 600]) as proxy,
        AgentServerClient(proxy.url) as client,
    ):
        heard = [event async for event in client.runs.events(run_id)]
    assert proxy.cut == 3
    facts = [event.seq for event in heard if event.seq is not None]
    assert facts == [event["seq"] for event in api.events(run_id)]
    assert heard[-1].type == "run.succeeded"


def test_the_end_of_a_reader_is_not_the_end_of_the_run(api: Api, models: ModelThread) -> None:
    models.script(TALE)
    body = json.dumps({"agent": "talker", "input": "a tale", "stream": True})
    headers = {"content-type": "application/json"}
    with api.http.stream("POST", RUNS, content=body, headers=headers) as answer:
        run_id = answer.headers["location"].rpartition("/")[2]
    assert api.ended(run_id)["status"] == "succeeded"


def test_an_orderly_stop_ends_the_streams_and_the_run_goes_on_after_a_restart(
    house: House, models: ModelThread, tmp_path: Path
) -> None:
    """As an operator does it: a real ``agent-server serve``, SIGTERM, and the same again."""
    models.script(
        rule("pay", calling(("add", {"a": 1, "b": 2})), {"text": "done", "latency_s": 30})
    )
    env = house.env | {"AGENT_SERVER_DATA_DIR": str(tmp_path / "data")}
    with serving(tmp_path, env) as (process, api):
        run_id = api.submit(agent="talker", input="pay")
        models.wait(lambda server: len(server.raw_calls) == 2)
        streams = [Reader(api.url, run_id) for _ in range(5)]
        for stream in streams:
            assert stream.heard.wait(10)
        asked = monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
        assert monotonic() - asked < 10
        for stream in streams:
            events = parse_sse(stream.all())
            assert types(events)[-1] == "server.draining", types(events)
            assert "retry: " in stream.text
            assert "run.succeeded" not in types(events)
        log = (tmp_path / "serve.log").read_text()
        assert "Traceback" not in log, log
    models.wait(lambda server: server.unanswered == 0)
    models.script(rule("pay", calling(("add", {"a": 1, "b": 2})), {"text": "done"}))
    again = house.start(AGENT_SERVER_DATA_DIR=env["AGENT_SERVER_DATA_DIR"])
    run = again.ended(run_id)
    assert (run["status"], run["output"]) == ("succeeded", "done")
    check_totals(again, run)
    events = again.events(run_id)
    tools = [e for e in events if e["type"] == "step.started" and e["kind"] == "tool"]
    assert len(tools) == 1, "the finished tool was called again"
    assert len(models.calls) == 1, "the finished model call was made again"
    assert run["usage"]["model_calls"] == 2


class Reader:
    """Follows a run in a thread, to its end."""

    def __init__(self, url: str, run_id: str) -> None:
        self.text = ""
        self.heard = threading.Event()
        self._place = f"{url}{RUNS}/{run_id}/events"
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with httpx2.stream("GET", self._place, timeout=60) as answer:
            for piece in answer.iter_text():
                self.text += piece
                self.heard.set()

    def all(self) -> str:
        self._thread.join(15)
        assert not self._thread.is_alive()
        return self.text


class serving:
    """``agent-server serve`` as a process, from its start to its end."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._folder = folder
        clean = {k: v for k, v in os.environ.items() if not k.startswith("AGENT_SERVER_")}
        self._env = clean | env | {"AGENT_SERVER_PORT": str(self._port)}

    def __enter__(self) -> tuple[subprocess.Popen[bytes], Api]:
        with (self._folder / "serve.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "agent_server", "serve"],
                cwd=self._folder,
                env=self._env,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        api = Api(f"http://127.0.0.1:{self._port}")
        deadline = monotonic() + 60
        while monotonic() < deadline:
            try:
                if api.http.get("/readyz").status_code == 200:
                    return self._process, api
            except httpx2.TransportError:
                try:
                    code = self._process.wait(0.05)
                except subprocess.TimeoutExpired:
                    continue
                raise AssertionError(f"it ended with {code}") from None
        raise AssertionError("it did not become ready")

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait(10)
