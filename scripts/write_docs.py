"""Write the pages that follow from the code: settings, metrics, the workflow's schema, and the example environment.

Leans on `Settings` and `Metrics`, which hold the words. Refuses to be run for its side effects in
tests: `pages()` says what each file should hold, and a test compares.

    uv run python scripts/write_docs.py
"""

import json
from pathlib import Path

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from agent_server.cli.configuration import variable
from agent_server.observability import Metrics
from agent_server.settings import Settings
from agent_server.workflow.schema import definition_schema

ROOT = Path(__file__).resolve().parent.parent
GENERATED = "<!-- Written by scripts/write_docs.py: edit the code, then run `make docs`. -->\n"


def default_of(field: FieldInfo) -> str:
    """The default as one writes it in the environment; empty where there is none."""
    value = field.get_default(call_default_factory=True)
    if value is None or value == "":
        return ""
    if isinstance(value, SecretStr):
        return ""
    return json.dumps(value) if isinstance(value, bool) else str(value)


def configuration() -> str:
    """docs/configuration.md"""
    rows = [
        f"| `{variable(name)}` | {f'`{default}`' if (default := default_of(field)) else '–'} "
        f"| {(field.description or '').replace('|', '&#124;')} |"
        for name, field in Settings.model_fields.items()
    ]
    return (
        "# Configuration\n\n"
        + GENERATED
        + "\nEvery setting is an environment variable; a file `.env` in the working folder is "
        "read too,\nand the environment wins over it. `AGENT_SERVER_X_FILE` names a file that "
        "holds the value of\n`AGENT_SERVER_X`: use it for secrets. Names that end in `_s` are "
        "seconds.\n\n"
        "`agent-server config` prints the values in effect and where each comes from. A variable "
        "that no\nsetting reads is reported at the start, with the nearest name.\n\n"
        "| variable | default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n\n"
        "Read by the command line only: `AGENT_SERVER_URL`, the server that commands speak to.\n"
    )


def metrics() -> str:
    """docs/metrics.md"""
    rows = []
    for family in sorted(Metrics().registry.collect(), key=lambda family: family.name):
        if family.name.startswith("agent_server_"):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            rows.append(f"| `{name}` | {family.type} | {family.documentation} |")
    return (
        "# Metrics\n\n"
        + GENERATED
        + "\n`GET /metrics` answers in Prometheus' text format to `AGENT_SERVER_API_KEY` (or, without "
        "keys, to this machine).\nEach process counts what it did itself: sum over processes.\n\n"
        "| name | kind | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n\n"
        "The process's own `process_*` metrics follow. Labels are bounded: of tools, models and "
        "routes the\nfirst 100 names have a series each, the rest share `other`.\n"
    )


def example_environment() -> str:
    """.env.example"""
    lines = [
        "# Copy to .env and uncomment what should differ from its default.",
        "# Written by scripts/write_docs.py from the settings.",
    ]
    for name, field in Settings.model_fields.items():
        lines += ["", f"# {field.description}", f"# {variable(name)}={default_of(field)}"]
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """What each generated file should hold, by its path."""
    return {
        "docs/configuration.md": configuration(),
        "docs/metrics.md": metrics(),
        "docs/workflow.schema.json": json.dumps(definition_schema(), indent=1) + "\n",
        ".env.example": example_environment(),
    }


def main() -> None:
    for path, text in pages().items():
        (ROOT / path).write_text(text, encoding="utf-8")
        print(f"{path} written.")


if __name__ == "__main__":
    main()
