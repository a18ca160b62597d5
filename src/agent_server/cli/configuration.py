"""``agent-server config``: every setting, its effective value, and where that comes from.

Leans on the settings. Refuses to print a secret.
"""

import json
import os
import sys
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pydantic import SecretStr
from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agent_server.settings import PREFIX, Settings, load_settings

MASK = "••••••"


def variable(name: str) -> str:
    """The environment variable that sets the field ``name``."""
    alias = Settings.model_fields[name].validation_alias
    return alias if isinstance(alias, str) else f"{PREFIX}{name.upper()}"


def shown(settings: Settings, name: str) -> Any:
    """The effective value of ``name`` as JSON, a secret masked."""
    value = getattr(settings, name)
    if name == "database_url":
        return without_password(settings.database)
    if name == "model":
        return settings.effective_model
    if isinstance(value, SecretStr):
        return MASK
    return to_jsonable_python(value, exclude_none=True)


def without_password(url: str) -> str:
    """``url`` with its password masked."""
    parts = urlsplit(url)
    if not parts.password:
        return url
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:{MASK}@{host}"))


def source(settings: Settings, name: str) -> str:
    """Where the value of ``name`` comes from."""
    if os.environ.get(f"{PREFIX}{name.upper()}_FILE"):
        return "file"
    if os.environ.get(variable(name)):
        return "environment"
    return ".env" if name in settings.model_fields_set else "default"


def print_config(*, as_json: bool) -> None:
    """Print every setting."""
    settings = load_settings()
    if as_json:
        rows = {
            variable(name): {
                "value": shown(settings, name),
                "source": source(settings, name),
                "description": field.description,
            }
            for name, field in Settings.model_fields.items()
        }
        sys.stdout.write(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
        return
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("from", no_wrap=True)
    table.add_column("meaning", style="dim")
    for name, field in Settings.model_fields.items():
        value, origin = shown(settings, name), source(settings, name)
        table.add_row(
            variable(name),
            Text("" if value is None else str(value), style="" if origin == "default" else "bold"),
            origin,
            field.description or "",
        )
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    console.print(table)
