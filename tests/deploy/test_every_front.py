"""main.py, `agent-server serve`, and Gunicorn twice behind nginx and HAProxy: one client passes
against each."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from tests.deploy import client, slow
from tests.durability.world import ready_at
from tests.support.server_process import Nursery

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "agents.py").write_text(client.AGENTS)
    return tmp_path


@pytest.mark.timeout(90)
async def test_the_client_passes_against_main_py(folder: Path) -> None:
    port = free_port()
    shutil.copy(ROOT / "main.py", folder)
    ours = ("AGENT_SERVER_", "OPENAI_", "PYTHONDONTWRITEBYTECODE")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    with (folder / "main.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "main.py"],
            cwd=folder,
            env=clean
            | slow.LIMITS
            | {"AGENT_SERVER_PORT": str(port), "AGENT_SERVER_RELOAD": "false"},
            stdout=log,
            stderr=log,
        )
    try:
        await ready_at(f"http://127.0.0.1:{port}")
        await client.check(f"http://127.0.0.1:{port}")
        await slow.check(port)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)


@pytest.mark.timeout(60)
async def test_the_client_passes_against_serve(folder: Path, nursery: Nursery) -> None:
    port = free_port()
    env = {"AGENT_SERVER_PORT": str(port), "AGENT_SERVER_LOG_LEVEL": "WARNING", **slow.LIMITS}
    process = nursery.run("serve", env=env, folder=folder)
    await ready_at(f"http://127.0.0.1:{port}")
    await client.check(f"http://127.0.0.1:{port}")
    await slow.check(port)
    process.signal(signal.SIGTERM)
    assert process.exit_code(20) == 0
    assert "Traceback" not in process.output


@pytest.mark.timeout(90)
@pytest.mark.parametrize("balancer", ["nginx", "haproxy"])
async def test_the_client_passes_against_two_gunicorns_behind_a_load_balancer(
    folder: Path, nursery: Nursery, postgres_url: str, balancer: str
) -> None:
    program = shutil.which(balancer) or shutil.which(balancer, path="/usr/sbin")
    if program is None:
        package = {"nginx": "nginx-light"}.get(balancer, balancer)
        pytest.skip(f"{balancer} is not installed (Debian: apt-get install {package})")
    ports, front = (free_port(), free_port()), free_port()
    env = {
        "AGENT_SERVER_DATABASE_URL": postgres_url,
        "AGENT_SERVER_LOG_LEVEL": "WARNING",
        "AGENT_SERVER_ALLOWED_HOSTS": "127.0.0.1",
        "AGENT_SERVER_API_KEY": KEY,
        **slow.LIMITS,
    }
    servers = []
    for port in ports:
        argv = ["gunicorn", "-k", "agent_server.cli.gunicorn.Worker", "-w", "1"]
        argv += ["--chdir", str(folder)]
        argv += ["-b", f"127.0.0.1:{port}", "agent_server.cli.serve:application()"]
        servers.append(nursery.run(*argv, env=env, folder=folder, log=f"gunicorn{port}.log"))
    configured = {"nginx": nginx_configured, "haproxy": haproxy_configured}[balancer]
    seen = folder / "access.log"
    with seen.open("w") as output, (folder / "errors.log").open("w") as errors:
        process = subprocess.Popen(
            [program, *configured(folder, front, ports)], stdout=output, stderr=errors
        )
    try:
        for port in (*ports, front):
            await ready_at(f"http://127.0.0.1:{port}")
        await client.check(f"http://127.0.0.1:{front}", KEY)
        # Either of them answers for every run.
        runs = []
        for port in ports:
            async with httpx2.AsyncClient(headers=client.bearer(KEY)) as each:
                runs.append((await each.get(f"http://127.0.0.1:{port}/api/v1/runs")).json())
        assert runs[0] == runs[1] and len(runs[0]["data"]) == 4
        used = re.findall(r'"upstream": "127.0.0.1:(\d+)"', seen.read_text())
        assert set(used) == {str(port) for port in ports}, "one of them was never asked"
        await slow.check(ports[1], KEY)
        # One of them goes; callers notice nothing.
        servers[0].signal(signal.SIGTERM)
        await client.check(f"http://127.0.0.1:{front}", KEY)
        assert servers[0].exit_code(20) == 0
    finally:
        process.terminate()
        process.wait(10)
        for server in servers:
            server.signal(signal.SIGTERM)
    assert servers[1].exit_code(20) == 0


KEY = "a-key-of-the-test"


def ours(balancer: str, file: str, front: int, ports: tuple[int, int]) -> str:
    """The configuration of deploy/, with ports of this test in place of compose's names."""
    text = (ROOT / "deploy" / balancer / file).read_text()
    for name, port in zip(("api-1:8000", "api-2:8000"), ports, strict=True):
        assert name in text
        text = text.replace(name, f"127.0.0.1:{port}")
    listens = re.compile(r"^( *(?:listen|bind)) :?8080(;?)$", re.MULTILINE)
    text, found = listens.subn(rf"\1 127.0.0.1:{front}\2", text)
    assert found == 1
    return text


def nginx_configured(folder: Path, front: int, ports: tuple[int, int]) -> list[str]:
    """How to start it; each request is a line of ``access.log``."""
    logged = '\'{"status": "$status", "upstream": "$upstream_addr"}\''
    temporary = "\n".join(
        f"{kind}_temp_path {folder}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    path = folder / "nginx.conf"
    path.write_text(
        f"daemon off;\n{user}\npid {folder}/nginx.pid;\nerror_log {folder}/error.log;\n"
        "events {}\nhttp {\n"
        f"{temporary}\nlog_format seen {logged};\naccess_log {folder}/access.log seen;\n"
        f"{ours('nginx', 'agent-server.conf', front, ports)}\n}}\n"
    )
    return ["-p", str(folder), "-c", str(path)]


def haproxy_configured(folder: Path, front: int, ports: tuple[int, int]) -> list[str]:
    """How to start it in the foreground; each request is a line of its output."""
    logged = 'log global\n    log-format \'{"status": "%ST", "upstream": "%si:%sp"}\''
    text = ours("haproxy", "agent-server.cfg", front, ports)
    assert text.count("mode http\n") == 1
    text = text.replace("mode http\n", f"mode http\n    {logged}\n")
    path = folder / "haproxy.cfg"
    path.write_text(f"global\n    log stdout format raw local0\n{text}")
    return ["-db", "-f", str(path)]
