"""``docs/api.md`` keeps up with the code: every route and every error code has its line."""

import re
from pathlib import Path

from fastapi.routing import APIRoute

from agent_server.domain.errors import ConfigurationError, RunError, error_codes
from tests.api.harness import Server, settings

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def test_every_route_has_its_line_and_no_other_is_promised() -> None:
    routes = {
        f"{method} {route.path}"
        for route in Server(settings()).app.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    assert set(re.findall(r"^\| `((?:GET|POST|PUT|PATCH|DELETE) [^`]+)` \|", PAGE, re.M)) == routes


def test_every_error_that_a_caller_can_meet_has_its_line() -> None:
    for code, error in error_codes().items():
        startup = issubclass(error, ConfigurationError) and error.status == 500
        if not issubclass(error, RunError) and not startup:
            assert f"`{code}`" in PAGE, code
