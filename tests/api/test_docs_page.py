"""``docs/api.md`` names every error that a caller can meet; ``tests/test_docs.py`` has the routes."""

from pathlib import Path

from agent_server.domain.errors import ConfigurationError, RunError, error_codes

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def test_every_error_that_a_caller_can_meet_has_its_line() -> None:
    for code, error in error_codes().items():
        startup = issubclass(error, ConfigurationError) and error.status == 500
        if not issubclass(error, RunError) and not startup:
            assert f"`{code}`" in PAGE, code
