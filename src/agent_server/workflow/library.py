"""The workflows that a server keeps: stored in versions that never change, and looked up by runs.

Leans on its store, on validation and on the names that exist at the moment. Refuses to run
anything. Every call is for one tenant.

A run holds its definition itself, with those of the workflows that its nodes name: neither a new
version nor a deletion ever touches it.
"""

import re
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Final, Protocol

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import FieldError, InvalidWorkflow, NotFound, UnknownWorkflow
from agent_server.domain.ids import Tenant
from agent_server.domain.plans import PlanState
from agent_server.domain.runs import Task
from agent_server.domain.stored_workflows import (
    DryRun,
    DryRunRequest,
    GraphEdge,
    GraphNode,
    Saved,
    SaveMode,
    StoredWorkflow,
    WorkflowGraph,
    WorkflowReport,
    WorkflowVersion,
)
from agent_server.domain.workflows import WorkflowDefinition
from agent_server.execution.runs import Idempotency
from agent_server.storage.database import Database
from agent_server.workflow import store
from agent_server.workflow.calls import (
    MAX_CHAIN,
    endless,
    names_itself,
    reference_to,
    references_in,
    split_name,
)
from agent_server.workflow.dry_run import dry_run
from agent_server.workflow.graph import analyse
from agent_server.workflow.picture import draw, mermaid, states_of
from agent_server.workflow.source import read_source
from agent_server.workflow.validation import invalid, parse, validate
from agent_server.workflow.values import did_you_mean

NAMES_KNOWN: Final = 1_000
"""Names that are looked at for a suggestion."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


class Check(Protocol):
    """Validates a definition against the names that exist now, and those of ``workflows``."""

    def __call__(
        self, definition: JsonObject, workflows: Collection[str] | None
    ) -> WorkflowDefinition: ...


class Library:
    """Stored workflows."""

    def __init__(self, database: Database, check: Check) -> None:
        self._database = database
        self._check = check

    async def validate(self, tenant: Tenant, text: str) -> WorkflowReport:
        """Everything that is wrong with the definition in ``text``, YAML or JSON."""
        try:
            await self._read(tenant, text)
        except InvalidWorkflow as error:
            return WorkflowReport(valid=False, errors=error.errors)
        return WorkflowReport(valid=True)

    async def save(
        self,
        tenant: Tenant,
        principal: str,
        text: str,
        mode: SaveMode,
        *,
        name: str | None = None,
        if_match: Collection[str] | None = None,
        if_none_match: Collection[str] | None = None,
        idempotency: Idempotency | None = None,
    ) -> Saved:
        """Store the definition in ``text`` (YAML or JSON) as a new version.

        ``name`` is what the definition must be called; None takes its own. What equals the newest
        version makes no new one. Raises ``InvalidWorkflow``, ``Conflict`` (the name, or the
        version that the definition names, is taken), ``NotFound``, ``PreconditionFailed`` (the
        newest version is none of ``if_match``, or one of ``if_none_match``).
        """
        definition = await self._read(tenant, text, name)
        label = definition.pop("version", None)
        saving = store.Saving(
            tenant=tenant,
            principal=principal,
            name=definition["name"],
            label=None if label is None else str(label),
            definition=definition,
            mode=mode,
            if_match=if_match,
            if_none_match=if_none_match,
            idempotency=idempotency,
        )
        return await self._database.write(lambda c: store.save(c, saving))

    async def get(self, tenant: Tenant, name: str, version: str | None = None) -> StoredWorkflow:
        """A version; None is the newest. Raises ``NotFound``."""

        found = await self._database.read(lambda c: store.fetch(c, tenant, name, version))
        if found is None:
            raise await self._unknown(tenant, name, version)
        return found

    async def list(
        self, tenant: Tenant, *, q: str | None, limit: int, before: tuple[datetime, str] | None
    ) -> tuple[Sequence[WorkflowVersion], tuple[datetime, str] | None]:
        """The newest version of each, the youngest workflow first, and where the next page is."""
        rows = await self._database.read(
            lambda c: store.list_latest(c, tenant, q=q, before=before, limit=limit + 1)
        )
        more = (rows[limit - 1].begun_at, rows[limit - 1].name) if len(rows) > limit else None
        return [store.version_of(row) for row in rows[:limit]], more

    async def versions(
        self, tenant: Tenant, name: str, *, limit: int, below: int | None
    ) -> tuple[Sequence[WorkflowVersion], int | None]:
        """The versions of a workflow, newest first, and where the next page is."""
        rows = await self._database.read(
            lambda c: store.list_versions(c, tenant, name, below=below, limit=limit + 1)
        )
        if not rows and below is None:
            raise await self._unknown(tenant, name, None)
        more = rows[limit - 1].number if len(rows) > limit else None
        return [store.version_of(row) for row in rows[:limit]], more

    async def delete(
        self, tenant: Tenant, name: str, *, if_match: Collection[str] | None = None
    ) -> None:
        """Delete a workflow with all its versions. Runs under way go on. Raises ``NotFound``."""

        if not await self._database.write(lambda c: store.remove(c, tenant, name, if_match)):
            raise await self._unknown(tenant, name, None)

    async def definition(self, tenant: Tenant, name: str, version: str | None) -> JsonObject:
        """See ``ports.StoredWorkflows``."""
        try:
            stored = await self.get(tenant, name, version)
        except NotFound as error:
            raise UnknownWorkflow(error.detail, hint=error.hint) from error
        return {**stored.definition, "version": stored.version}

    async def pinned(
        self, tenant: Tenant, workflow: JsonObject, *, stored: bool = False
    ) -> JsonObject:
        """``workflow`` with every stored definition that its nodes name written down in it.

        ``stored``: it is kept under its name itself; else its own name, wherever it is called, means
        what is sent here. Raises ``UnknownWorkflow``, and ``InvalidWorkflow`` for one that comes to
        call itself.
        """
        held: dict[str, JsonObject] = dict(workflow.get("workflows") or {})
        outermost, _ = parse(workflow)
        models = [outermost, *(parse(each)[0] for each in held.values())]
        for _ in range(MAX_CHAIN):
            named = [ref for model in models if model for ref in references_in(model)]
            models = []
            for name, version in dict.fromkeys(named):
                itself = not stored and outermost and names_itself(outermost, name, version)
                reference = reference_to(name, version)
                if not itself and reference not in held:
                    held[reference] = await self.definition(tenant, name, version)
                    models.append(parse(held[reference])[0])
        pinned = {**workflow, "workflows": held} if held else workflow
        model, _ = parse(pinned)
        errors = [] if model is None else list(endless(analyse(model)))
        if errors:
            raise invalid(errors)
        return pinned

    async def dry_run(self, tenant: Tenant, asked: DryRunRequest) -> DryRun:
        """The way that a workflow would go. Raises ``InvalidRequest`` or a kind of it."""
        workflow = asked.workflow
        if isinstance(workflow, str):
            workflow = await self.definition(tenant, *split_name(workflow))
        self._check(workflow, None)
        pinned = await self.pinned(tenant, workflow, stored=isinstance(asked.workflow, str))
        return await dry_run(tenant, pinned, asked)

    async def graph(self, tenant: Tenant, name: str, version: str | None = None) -> WorkflowGraph:
        """A stored workflow as nodes and edges. Raises ``NotFound``."""
        stored = await self.get(tenant, name, version)
        return draw(validate({**stored.definition, "version": stored.version}))

    def graph_of_run(
        self, workflow: JsonObject, tasks: Sequence[Task], *, succeeded: bool
    ) -> WorkflowGraph:
        """The workflow of a run, with how far each of its nodes is."""
        definition = validate(workflow)
        places = [(task.path, task.status) for task in tasks]
        return draw(definition, states_of(definition, places, succeeded=succeeded))

    def graph_of_plan(self, plan: PlanState) -> WorkflowGraph:
        """A plan, with how far each of its tasks is."""
        nodes = tuple(
            GraphNode(
                id=task.id,
                type="agent" if task.agent else "approach",
                label=f"agent {task.agent}" if task.agent else "task",
                status=task.status,
                count=0 if task.status == "pending" else 1,
            )
            for task in plan.tasks
        )
        known = {task.id for task in plan.tasks}
        edges = tuple(
            GraphEdge(source=other, target=task.id)
            for task in plan.tasks
            for other in task.depends_on
            if other in known
        )
        return WorkflowGraph(
            name="plan",
            version=str(plan.revision),
            nodes=nodes,
            edges=edges,
            mermaid=mermaid(nodes, edges),
        )

    async def names(self, tenant: Tenant) -> Sequence[str]:
        rows = await self._database.read(
            lambda c: store.list_latest(c, tenant, q=None, before=None, limit=NAMES_KNOWN)
        )
        return [row.name for row in rows]

    async def _read(self, tenant: Tenant, text: str, name: str | None = None) -> JsonObject:
        source = read_source(text)
        errors: tuple[FieldError, ...] = ()
        try:
            self._check(source.data, await self.names(tenant))
            await self.pinned(tenant, source.data)
        except UnknownWorkflow as error:
            errors = (FieldError(path="/nodes", message=error.detail, hint=error.hint),)
        except InvalidWorkflow as error:
            errors = error.errors
        errors = (*errors, *_label_errors(source.data, name))
        if errors:
            raise invalid(errors, source.line_of)
        return dict(source.data)

    async def _unknown(self, tenant: Tenant, name: str, version: str | None) -> NotFound:
        names = await self.names(tenant)
        if name in names:
            return NotFound(
                f"The workflow {name!r} has no version {version!r}.",
                hint=f"GET /api/v1/workflows/{name}/versions lists them.",
            )
        return NotFound(
            f"There is no stored workflow {name[:100]!r}.",
            hint=did_you_mean(name, names) or "GET /api/v1/workflows lists them.",
        )


def _label_errors(data: JsonObject, name: str | None) -> Sequence[FieldError]:
    """What keeps a definition from being stored, besides what keeps it from being run."""
    found = []
    given, version = data.get("name"), data.get("version")
    if name is not None and isinstance(given, str) and given != name:
        message = f"the definition is called {given!r}, not {name!r}"
        hint = "Send it to a path with its own name, or change the name in it."
        found.append(FieldError(path="/name", message=message, hint=hint))
    elif isinstance(given, str) and given and not _NAME.fullmatch(given):
        message = f"{given[:100]!r} cannot be the name of a stored workflow"
        hint = "Use letters, digits, '.', '_' and '-', at most 100, a letter or digit first."
        found.append(FieldError(path="/name", message=message, hint=hint))
    if data.get("workflows"):
        message = "a stored workflow names others and does not hold them"
        hint = "Store them under their own names."
        found.append(FieldError(path="/workflows", message=message, hint=hint))
    if isinstance(version, (str, int)) and not _VERSION.fullmatch(str(version)):
        message = f"{str(version)[:100]!r} cannot be a version"
        hint = "Use letters, digits, '.', '_', '+' and '-', at most 64, or leave it out."
        found.append(FieldError(path="/version", message=message, hint=hint))
    return found
