"""The files under deploy/ and compose.yaml name only what there is, and give time enough."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from fastapi.routing import APIRoute

from agent_server.cli.app import app as commands
from agent_server.cli.configuration import variable
from agent_server.server import create_app
from agent_server.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
KUBERNETES: list[Any] = yaml.safe_load(
    (ROOT / "deploy" / "kubernetes" / "agent-server.yaml").read_text()
)["items"]
NGINX = (ROOT / "deploy" / "nginx" / "agent-server.conf").read_text()
KNOWN = {variable(name) for name in Settings.model_fields}
HAPROXY = (ROOT / "deploy" / "haproxy" / "agent-server.cfg").read_text()
HAND_OVER_S = 10


def ours(services: dict[str, Any]) -> dict[str, Any]:
    return {n: s for n, s in services.items() if s["image"] == "agent-server"}


def containers() -> Iterator[tuple[Any, Any]]:
    """Each pod template of ours with its container."""
    for item in KUBERNETES:
        if item["kind"] in ("Job", "Deployment"):
            pod = item["spec"]["template"]["spec"]
            for container in pod["containers"]:
                yield pod, container


def environments() -> Iterator[dict[str, str]]:
    for service in ours(COMPOSE["services"]).values():
        yield service["environment"]
    for item in KUBERNETES:
        if item["kind"] == "ConfigMap":
            yield item["data"]


def test_every_variable_is_a_setting_and_every_value_fits_it() -> None:
    for environment in environments():
        assert set(environment) <= KNOWN, set(environment) - KNOWN
        given = {
            name.removeprefix("AGENT_SERVER_").lower(): value
            for name, value in environment.items()
            if name.startswith("AGENT_SERVER_") and "${" not in value
        }
        Settings(_env_file=None, **given)  # type: ignore[call-arg]


def test_every_command_is_one_of_the_command_line() -> None:
    found = [s["command"] for s in ours(COMPOSE["services"]).values()]
    found += [container["command"] for _, container in containers()]
    assert len(found) == 4 + 3
    for program, *arguments in found:
        assert program == "agent-server"
        group: Any = typer.main.get_command(commands)
        while arguments and hasattr(group, "commands"):
            group = group.commands[arguments.pop(0)]
        group.make_context("agent-server", arguments, resilient_parsing=False)


def test_each_process_is_given_the_time_that_its_drain_takes() -> None:
    for service in ours(COMPOSE["services"]).values():
        if "serve" in service["command"]:
            assert int(service["stop_grace_period"].rstrip("s")) >= needed(service["environment"])
    config = next(i["data"] for i in KUBERNETES if i["kind"] == "ConfigMap")
    for pod, container in containers():
        if "serve" in container["command"]:
            assert pod["terminationGracePeriodSeconds"] >= needed(config)


def needed(environment: dict[str, str]) -> float:
    return (
        max(
            float(environment["AGENT_SERVER_DRAIN_DELAY_S"]),
            float(environment["AGENT_SERVER_SHUTDOWN_GRACE_S"]),
        )
        + HAND_OVER_S
    )


def test_probes_ask_for_routes_that_there_are_on_the_port_that_is_open() -> None:
    app: Any = create_app(Settings(_env_file=None))  # type: ignore[call-arg]
    paths = {route.path for route in app.routes if isinstance(route, APIRoute)}
    probes = 0
    for _, container in containers():
        ports = {port["name"] for port in container.get("ports", [])}
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            if name in container:
                probes += 1
                asked = container[name]["httpGet"]
                assert asked["path"] in paths and asked["port"] in ports
        if "readinessProbe" in container:
            assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
            assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert probes == 6
    dockerfile = (ROOT / "Dockerfile").read_text()
    for _, container in containers():
        for port in container.get("ports", []):
            assert f"EXPOSE {port['containerPort']}" in dockerfile


def test_selectors_choose_the_pods_and_each_role_may_lose_all_but_one() -> None:
    pods = [
        item["spec"]["template"]["metadata"]["labels"]
        for item in KUBERNETES
        if item["kind"] == "Deployment"
    ]
    for item in KUBERNETES:
        selector = item["spec"].get("selector") if "spec" in item else None
        if selector is not None:
            labels = selector.get("matchLabels", selector)
            assert any(labels.items() <= pod.items() for pod in pods), item["metadata"]
    budgets = [i for i in KUBERNETES if i["kind"] == "PodDisruptionBudget"]
    assert {b["spec"]["selector"]["matchLabels"]["role"] for b in budgets} == {"api", "worker"}


def test_the_load_balancer_s_servers_are_services_that_listen_there() -> None:
    upstreams = dict(re.findall(r"server ([\w-]+):(\d+) ", NGINX))
    assert set(upstreams) <= set(ours(COMPOSE["services"])) and len(upstreams) == 2
    assert set(upstreams.values()) == {str(Settings.model_fields["port"].default)}
    listens = re.search(r"listen (\d+);", NGINX)
    assert listens and COMPOSE["services"]["lb"]["ports"] == [f"8080:{listens[1]}"]
    read_s = re.search(r"proxy_read_timeout (\d+)s;", NGINX)
    assert read_s and int(read_s[1]) > 2 * Settings.model_fields["stream_ping_s"].default


def test_haproxy_s_servers_are_those_of_nginx_and_its_times_fit() -> None:
    assert re.findall(r"server ([\w-]+ [\w-]+:\d+)\n", HAPROXY) == [
        f"{name} {name}:{port}" for name, port in re.findall(r"server ([\w-]+):(\d+) ", NGINX)
    ]
    ping_s = Settings.model_fields["stream_ping_s"].default
    for side in ("client", "server"):
        found = re.search(rf"timeout {side} (\d+)s", HAPROXY)
        assert found and int(found[1]) > 2 * ping_s
    # The server's own answer to slow headers is the one that says what to do.
    headers = re.search(r"timeout http-request (\d+)s", HAPROXY)
    assert headers and int(headers[1]) > Settings.model_fields["header_timeout_s"].default
    assert "GET /readyz" in HAPROXY


def test_every_service_starts_after_what_it_needs() -> None:
    services = COMPOSE["services"]
    for service in services.values():
        assert set(service.get("depends_on", ())) <= set(services)
    assert services["migrate"]["depends_on"] == {"db": {"condition": "service_healthy"}}
    for name in ("api-1", "api-2", "worker"):
        assert services[name]["depends_on"]["migrate"]["condition"] == (
            "service_completed_successfully"
        )
    assert services["worker"]["deploy"]["replicas"] == 2


@pytest.mark.parametrize("secret", ["AGENT_SERVER_API_KEY", "POSTGRES_PASSWORD"])
def test_no_secret_has_a_default(secret: str) -> None:
    text = (ROOT / "compose.yaml").read_text()
    uses = re.findall(r"\$\{" + secret + r"([^}]*)\}", text)
    assert uses and all(use.startswith(":?") for use in uses)
