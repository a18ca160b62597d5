"""The logs: their form, the ids they carry, and the secrets they do not."""

import io
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from agent_server.domain.secrets import MASK
from agent_server.observability import Redaction, configure_logs, secrets_of
from agent_server.observability.redaction import hides
from agent_server.settings import Settings

CANARY = "canary-4f1c9e"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [n for n in os.environ if n.startswith(("AGENT_SERVER_", "OPENAI_"))]:
        monkeypatch.delenv(name)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def settings(**values: Any) -> Settings:
    return Settings(_env_file=None, **values)  # type: ignore[call-arg]


def lines(**values: Any) -> io.StringIO:
    out = io.StringIO()
    configure_logs(settings(log_format="json", **values), out)
    return out


def test_a_line_is_one_json_object_with_the_ids_of_its_run_and_task() -> None:
    out = lines()
    structlog.contextvars.bind_contextvars(run_id="run_1", task_id="task_1.2")
    structlog.get_logger("agent_server.execution").info("Task taken up.", attempt=2)
    logging.getLogger("uvicorn.error").info("Started %s.", "process")
    ours, theirs = [json.loads(line) for line in out.getvalue().splitlines()]
    assert ours["message"] == "Task taken up." and ours["attempt"] == 2
    assert ours["level"] == "info" and ours["timestamp"].endswith("Z")
    for line in (ours, theirs):
        assert (line["run_id"], line["task_id"]) == ("run_1", "task_1.2")
    assert theirs["message"] == "Started process." and theirs["logger"] == "uvicorn.error"


def test_the_console_form_is_for_people() -> None:
    out = io.StringIO()
    configure_logs(settings(log_format="console"), out)
    structlog.get_logger("x").warning("Careful.", size=3)
    assert "Careful." in out.getvalue() and "size=3" in out.getvalue()
    assert "{" not in out.getvalue()


def test_lines_below_the_level_are_not_written_and_chatty_libraries_are_hushed() -> None:
    out = lines(log_level="INFO")
    structlog.get_logger("x").debug("small talk")
    logging.getLogger("openai").info("request")
    logging.getLogger("httpx2").info("request")
    assert out.getvalue() == ""


def test_a_secret_is_in_no_line_whatever_way_it_takes() -> None:
    out = lines(
        api_key=CANARY,
        database_url=f"postgresql://app:{CANARY}-db@host/name",
    )
    log = structlog.get_logger("x")
    log.info(f"said {CANARY}", anything={"deep": [CANARY]}, api_key=f"other-{CANARY}")
    log.info("headers", headers={"Authorization": "Basic " + CANARY, "Cookie": CANARY})
    log.info("url", url=f"postgresql://app:{CANARY}-db@host/name")
    logging.getLogger("uvicorn.error").warning("stdlib %s", CANARY)
    try:
        raise ValueError(f"in a traceback {CANARY}")
    except ValueError:
        log.exception("failed")
    text = out.getvalue()
    assert CANARY not in text
    assert text.count(MASK) >= 8
    assert "ValueError" in text


@pytest.mark.parametrize(
    "text",
    [
        "sk-proj-abcdefgh12345678",
        "Bearer abcdefgh12345678",
        "authorization: bearer abcdefgh.12345678",
        "https://user:hunter22@example.org/x",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
    ],
)
def test_what_looks_like_a_secret_is_taken_out_of_any_text(text: str) -> None:
    shown = Redaction().text(f"before {text} after")
    assert MASK in shown and "12345678" not in shown and "hunter22" not in shown
    assert shown.startswith("before ") and shown.endswith(" after")


@pytest.mark.parametrize(
    "name", ["key", "api_key", "apikey", "OPENAI_API_KEY", "x-auth-token", "password", "secrets"]
)
def test_names_of_secrets_hide_what_stands_under_them(name: str) -> None:
    assert hides(name)
    assert Redaction().value({name: "plain words"}) == {name: MASK}


@pytest.mark.parametrize(
    "name", ["input_tokens", "tokens", "idempotency_key", "step_key", "monkey", "keyboard"]
)
def test_names_that_only_sound_alike_hide_nothing(name: str) -> None:
    assert Redaction().value({name: "plain"}) == {name: "plain"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(JSON, st.text())
def test_a_known_secret_is_found_at_any_depth(value: Any, around: str) -> None:
    shown = Redaction([CANARY]).value([value, {around: [around + CANARY + around]}])
    assert CANARY not in json.dumps(shown)


def test_the_secrets_of_the_settings_are_known_by_value() -> None:
    known = secrets_of(settings(api_key="abcdefgh", database_url="postgresql://u:p%40ssword@h/d"))
    assert known == {"abcdefgh", "p%40ssword", "p@ssword"}
