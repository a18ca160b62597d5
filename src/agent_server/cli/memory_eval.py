"""``agent-server memory eval``: questions with known evidence, put to recall as it is served.

Leans on ``memory.evaluation``. Refuses to touch the server's own memories: it works in a SQLite
file that is gone afterwards.
"""

import json
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import cast, get_args

from rich.console import Console
from rich.table import Table

from agent_server.domain.errors import InvalidRequest
from agent_server.domain.memories import SearchMode
from agent_server.memory.evaluation import (
    Dataset,
    Figure,
    Measured,
    difference,
    measure,
    read_dataset,
    summary,
    write,
)
from agent_server.memory.long_term import LongTermMemory
from agent_server.memory.ranking import Weights
from agent_server.memory.recall import Recall
from agent_server.settings import Settings, load_settings
from agent_server.storage.database import database_at
from agent_server.storage.migrate import upgrade

WORDS_ALONE = Weights(vector=0, neighbours=0, session=0, author=0, date=0, name=1)
WAYS = (*get_args(SearchMode), "words")
"""How to search: a mode of the API, or ``words``: BM25 and nothing above it."""


async def evaluate(dataset: Path, way: str, against: str | None, *, as_json: bool) -> None:
    """Measure, and print a table or JSON. Raises ``InvalidRequest`` for what cannot be read."""
    for name in (way, against or way):
        if name not in WAYS:
            raise InvalidRequest(f"There is no way {name!r}.", hint=f"Use {', '.join(WAYS)}.")
    found = read_dataset(dataset)
    if not found.questions:
        raise InvalidRequest(f"{str(dataset)!r} has no question with evidence.")
    settings = load_settings()
    first = await _measured(settings, found, way)
    second = await _measured(settings, found, against) if against is not None else None
    if as_json:
        result = {way: _plain(summary(first))}
        if second is not None and against is not None:
            result |= {against: _plain(summary(second))}
            result["difference"] = {
                "all": {k: asdict(v) for k, v in difference(first, second).items()}
            }
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
        return
    console = Console()
    questions = Counter(one.category for one in first)
    console.print(_table(f"{dataset.name}: {way}", summary(first), questions))
    if second is not None and against is not None:
        console.print(_table(f"{dataset.name}: {against}", summary(second), questions))
        gain = {f"{against} - {way}": difference(first, second)}
        console.print(_table("Difference, question by question", gain, questions))


async def _measured(settings: Settings, dataset: Dataset, way: str) -> list[Measured]:
    with tempfile.TemporaryDirectory(prefix="memory-eval-") as folder:
        database = database_at(f"sqlite:///{folder}/data/eval.db")
        await database.open()
        try:
            await database.write(upgrade)
            memory = LongTermMemory(database, settings)
            await memory.open()
            await write(memory.store, dataset)
            if memory.embedding is not None and way not in {"text", "words"}:
                await memory.embedding.catch_up()
            if way == "words":
                Recall(memory.store, None, WORDS_ALONE)
                return await measure(memory.store, dataset.questions, "text")
            return await measure(memory.store, dataset.questions, cast(SearchMode, way))
        finally:
            await database.close()


def _plain(figures: dict[str, dict[str, Figure]]) -> dict[str, dict[str, dict[str, float]]]:
    return {c: {name: asdict(f) for name, f in of.items()} for c, of in figures.items()}


def _table(title: str, figures: dict[str, dict[str, Figure]], questions: Counter[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("category")
    table.add_column("questions", justify="right")
    for name in next(iter(figures.values())):
        table.add_column(name, justify="right")
    for category, of in figures.items():
        cells = (f"{f.mean:.3f} [{f.low:.2f}, {f.high:.2f}]" for f in of.values())
        table.add_row(category, str(questions.get(category, questions.total())), *cells)
    return table
