"""A server told to stop: not ready, streams end with word of it, work is handed over, it exits."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from tests.support.model_server import ModelServer
from tests.support.server_process import Command, Nursery
from tests.support.until import until

from .shared import SharedWorld, at_the_last_call, held_back, submit_to
from .world import World, ready_at, script, settled

EXIT_S = 10.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
async def world(tmp_path: Path, nursery: Nursery, postgres_url: str) -> AsyncIterator[SharedWorld]:
    async with ModelServer() as models:
        yield SharedWorld(tmp_path, models, nursery, url=postgres_url)


def under_uvicorn(world: SharedWorld, port: int) -> Command:
    env = world.environment(port=str(port), drain_delay_s="1", shutdown_grace_s="1", lease_s="600")
    return world.nursery.run("serve", env=env, folder=world.folder, log="serve.log")


def under_gunicorn(world: SharedWorld, port: int) -> Command:
    argv = ["gunicorn", "-k", "agent_server.cli.gunicorn.Worker", "-w", "2"]
    argv += ["-b", f"127.0.0.1:{port}", "agent_server.cli.serve:application()"]
    env = world.environment(drain_delay_s="1", shutdown_grace_s="1", lease_s="600")
    return world.nursery.run(*argv, env=env, folder=world.folder, log="gunicorn.log")


@pytest.mark.timeout(90)
@pytest.mark.parametrize("start", [under_uvicorn, under_gunicorn])
async def test_sigterm_drains_in_order_and_another_server_finishes_without_repeating(
    world: SharedWorld, start: object
) -> None:
    assert callable(start)
    world.models.script({"rules": held_back("d", 60)})
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process: Command = start(world, port)
    try:
        await ready_at(url)
        run_id = await submit_to(url, "d")
        follower = world.join(role="api")
        await ready_at(follower.url)
        await at_the_last_call(world, follower, run_id, "d")
        world.note_death("d", run_id)
        world.models.script({"rules": script("d")})
        limits = httpx2.Limits(max_keepalive_connections=0)
        async with httpx2.AsyncClient(timeout=30, limits=limits) as client:
            events = f"{url}/api/v1/runs/{run_id}/events"
            streams = []
            for _ in range(8):  # Enough for each worker of Gunicorn to have one.
                request = client.build_request(
                    "GET", events, headers={"Accept": "text/event-stream"}
                )
                streams.append(await client.send(request, stream=True))
            told_at = time.monotonic()
            process.signal(signal.SIGTERM)
            for stream in streams:
                text = (await stream.aread()).decode()
                assert "event: server.draining" in text and "retry: " in text, text[-500:]
                await stream.aclose()
            # It goes on answering, not ready, until the load balancer has had time to notice.
            answer = await client.get(f"{url}/readyz")
            assert answer.status_code == 503 and "going down" in answer.text
            assert (await client.get(f"{url}/livez")).status_code == 200
        assert await asyncio.to_thread(process.exit_code, EXIT_S) == 0
        assert time.monotonic() - told_at < EXIT_S
        worker = world.join()
        await ready_at(worker.url)
        assert world.check("d", run_id, await settled(follower, run_id)) == "succeeded"
        assert "Traceback" not in process.output
        await worker.kill(), await follower.kill()
    finally:
        process.signal(signal.SIGTERM)


@pytest.mark.timeout(60)
async def test_a_second_sigterm_cuts_the_wait_for_the_load_balancer_short(
    world: SharedWorld,
) -> None:
    port = free_port()
    env = world.environment(port=str(port), drain_delay_s="300", shutdown_grace_s="1")
    process = world.nursery.run("serve", env=env, folder=world.folder)
    await ready_at(f"http://127.0.0.1:{port}")
    process.signal(signal.SIGTERM)
    async with httpx2.AsyncClient() as client:

        async def unready() -> bool:
            return (await client.get(f"http://127.0.0.1:{port}/readyz")).status_code == 503

        await until(unready)
    process.signal(signal.SIGTERM)
    assert await asyncio.to_thread(process.exit_code, EXIT_S) == 0


@pytest.mark.timeout(60)
async def test_gunicorn_refuses_to_load_the_application_before_the_fork(
    world: SharedWorld,
) -> None:
    argv = ["gunicorn", "-k", "agent_server.cli.gunicorn.Worker", "--preload"]
    argv += ["-b", f"127.0.0.1:{free_port()}", "agent_server.cli.serve:application()"]
    process = world.nursery.run(*argv, env=world.environment(), folder=world.folder)
    assert await asyncio.to_thread(process.exit_code, 30) != 0
    assert "leave out --preload" in process.output


BLOCKS = """
import os
import time
from pathlib import Path

from agents import Agent, function_tool


@function_tool
def blocks() -> str:
    \"\"\"Nothing stops this.\"\"\"
    Path(os.environ["COUNT_FILE"]).write_text("begun")
    time.sleep(300)
    return "never"


worker = Agent(name="worker", tools=[blocks])
"""
BLOCKED = {"name": "b", "nodes": [{"id": "b", "type": "tool", "tool": "blocks"}]}


@pytest.mark.timeout(90)
@pytest.mark.parametrize("program", ["serve", pytest.param("gunicorn", marks=pytest.mark.slow)])
async def test_a_tool_that_blocks_its_thread_does_not_hold_up_the_end(
    tmp_path: Path, nursery: Nursery, program: str
) -> None:
    """A process of its own: one that was forked for a test would end in its own way."""
    async with ModelServer() as models:
        world = World(tmp_path, models, nursery)
        (tmp_path / "agents.py").write_text(BLOCKS)
        port = free_port()
        argv = ["-m", "agent_server", "serve"]
        if program == "gunicorn":
            argv = ["-m", "gunicorn", "-k", "agent_server.cli.gunicorn.Worker"]
            argv += ["-b", f"127.0.0.1:{port}", "agent_server.cli.serve:application()"]
        env = world.environment(port=str(port), shutdown_grace_s="0.5")
        with (tmp_path / "serve.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, *argv], cwd=tmp_path, env=os.environ | env, stdout=log, stderr=log
            )
        try:
            url = f"http://127.0.0.1:{port}"
            await ready_at(url)
            async with httpx2.AsyncClient(base_url=url, timeout=30) as client:
                made = await client.post("/api/v1/runs", json={"workflow": BLOCKED})
                while not world.count_file.read_text():
                    await client.get("/livez")
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, EXIT_S) == 0
        finally:
            process.kill()
        assert "left behind" in (tmp_path / "serve.log").read_text()
        # It may have happened: that is for a person to say.
        server = world.start()
        await ready_at(server.url)
        run = await settled(server, made.json()["id"])
        assert run["waiting_for"]["kind"] == "reconciliation", run
        await server.kill()
