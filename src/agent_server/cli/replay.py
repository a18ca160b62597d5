"""``agent-server replay`` and ``agent-server test``: recorded runs against the present code.

Leans on ``testing.replay``. Refuses to change a file of a test but to make one.
"""

import json
import sys
from pathlib import Path

from pydantic import ValidationError

from agent_server.cli.connect import Target, connect
from agent_server.cli.errors import printable
from agent_server.cli.loading import loading
from agent_server.cli.runs import LOOKING
from agent_server.domain.base import JsonObject
from agent_server.domain.errors import InvalidRequest
from agent_server.settings import load_settings

with loading():
    from agent_server.observability import configure_logs
    from agent_server.testing.replay import (
        FOLDER,
        SUFFIX,
        Checks,
        Report,
        as_test,
        read_export,
        recorded_tests,
        replayer,
    )


async def replay_file(path: Path, agents: str | None, as_json: bool) -> int:
    """Replay one file; 1 when there is a difference."""
    return await _replay([path], agents, as_json)


async def run_tests(paths: list[Path], agents: str | None, as_json: bool) -> int:
    """Replay every test in ``paths``; 1 when one fails."""
    found = recorded_tests(paths or [FOLDER])
    if not found:
        raise InvalidRequest(
            f"There are no tests (*{SUFFIX}) in {', '.join(map(str, paths or [FOLDER]))}.",
            hint="`agent-server test add RUN` makes one.",
        )
    return await _replay(found, agents, as_json)


async def add_test(
    where: Target,
    run_id: str,
    name: str | None,
    folder: Path | None,
    given: JsonObject,
    redact: str,
) -> int:
    """Write the run as a test, which passes at once or is not written."""
    checks = _checks(given) if given else None
    if redact == "content":
        raise InvalidRequest("A test needs the content of its run: use --redact secrets.")
    async with connect(where, LOOKING) as client:
        export = await client.runs.export(run_id, redact=redact)  # type: ignore[arg-type]  # the server checks
    path = (folder or FOLDER) / f"{_file_name(name or run_id)}{SUFFIX}"
    path.parent.mkdir(parents=True, exist_ok=True)
    body = as_test(export, checks).model_dump(mode="json")
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{path}\n")
    return 0


async def _replay(paths: list[Path], agents: str | None, as_json: bool) -> int:
    settings = load_settings({"agents": agents} if agents else {})
    configure_logs(settings.model_copy(update={"log_level": "ERROR"}))
    reports: list[tuple[Path, Report]] = []
    async with replayer(settings) as present:
        for path in paths:
            report = await present.replay(read_export(path))
            reports.append((path, report))
            if not as_json:
                _print(path, report)
    failed = [report for _, report in reports if not report.ok]
    if as_json:
        sys.stdout.write(json.dumps([_dumped(*one) for one in reports], indent=2) + "\n")
    elif len(reports) > 1:
        sys.stdout.write(f"{len(reports) - len(failed)} passed, {len(failed)} failed\n")
    return 1 if failed else 0


def _print(path: Path, report: Report) -> None:
    calls = f"{report.model_calls} model calls, {report.tool_calls} tool calls"
    sys.stdout.write(f"{'ok    ' if report.ok else 'DIFFERS'} {path} ({calls})\n")
    for said in (report.difference, *report.failures):
        if said is not None:
            sys.stdout.write(f"  {printable(said)}\n")


def _dumped(path: Path, report: Report) -> JsonObject:
    return {
        "file": str(path),
        "run_id": report.run_id,
        "ok": report.ok,
        "difference": report.difference,
        "failures": list(report.failures),
        "model_calls": report.model_calls,
        "tool_calls": report.tool_calls,
        "cost_usd": None if report.cost_usd is None else str(report.cost_usd),
    }


def _checks(given: JsonObject) -> Checks:
    path = given.get("output_schema")
    try:
        if path is not None:
            given = {**given, "output_schema": json.loads(Path(path).read_text("utf-8"))}
        return Checks.model_validate(given)
    except OSError as error:
        raise InvalidRequest(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    except ValidationError as error:
        raise InvalidRequest(f"The checks are not valid: {error.errors()[0]['msg']}.") from error
    except ValueError as error:
        raise InvalidRequest(f"{str(path)!r} is not JSON: {error}.") from error


def _file_name(name: str) -> str:
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name[0] == ".":
        raise InvalidRequest(f"{name!r} is no name for a file: use letters, digits, '-' and '_'.")
    return name
