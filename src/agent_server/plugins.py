"""The extension points, on one page: what may be added to the server, and how it is found.

Leans on entry points of installed distributions; what the server brings itself comes in through
the same door, named in the same way. Refuses to know what an extension does: each room says
what it expects of its own.

To add one, name it in your distribution's metadata:

    [project.entry-points."agent_server.approaches"]
    tree_of_thoughts = "my_package.tree:TreeOfThoughts"

| group | the entry point names | it makes |
|---|---|---|
| ``agent_server.approaches`` | a callable without arguments (a class will do) | an ``agent_server.reasoning.approach.Approach`` |
| ``agent_server.actions`` | a callable that takes ``ActionServices`` | an ``agent_server.actions.handler.ActionHandler`` |
| ``agent_server.document_readers`` | a callable that takes the bytes of a document; its name is the media type | the document's ``agent_server.memory.documents.Block``s |

Nothing is imported until it is used, so a broken plugin harms only those who ask for it; the
error then names the distribution that brought it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from agent_server.domain.errors import ConfigurationError

OURS = "agent-server"


@dataclass(frozen=True)
class ExtensionPoint:
    """A group of extensions: what they are called, and those that the server brings itself."""

    group: str
    noun: str
    builtin: Mapping[str, str]
    """Name to ``module:attribute``, as an entry point would say it."""


APPROACHES = ExtensionPoint(
    "agent_server.approaches",
    "approach",
    {
        "react": "agent_server.reasoning.react:React",
        "direct": "agent_server.reasoning.direct:Direct",
        "chain_of_thought": "agent_server.reasoning.chain_of_thought:ChainOfThought",
    },
)
ACTIONS = ExtensionPoint(
    "agent_server.actions",
    "action",
    {
        "tool": "agent_server.actions.tool:CallTool",
        "http_request": "agent_server.actions.http_request:HttpRequest",
        "emit": "agent_server.actions.emit:Emit",
    },
)
DOCUMENT_READERS = ExtensionPoint(
    "agent_server.document_readers",
    "document reader",
    {
        "text/plain": "agent_server.memory.documents:read_text",
        "text/markdown": "agent_server.memory.read_markdown:read_markdown",
        "text/html": "agent_server.memory.read_html:read_html",
        "application/pdf": "agent_server.memory.read_pdf:read_pdf",
    },
)
POINTS = (APPROACHES, ACTIONS, DOCUMENT_READERS)


@dataclass(frozen=True)
class Extension:
    """One extension by name, not yet imported."""

    name: str
    noun: str
    distribution: str
    """Who brought it: a distribution and its version."""
    entry: EntryPoint

    @cached_property
    def loaded(self) -> Callable[..., Any]:
        """What the entry point names. Raises ``ConfigurationError`` that says whose it is."""
        try:
            found = self.entry.load()
        except Exception as error:
            raise ConfigurationError(
                f"The {self.noun} {self.name!r} of {self.distribution} cannot be loaded from "
                f"{self.entry.value!r}: {type(error).__name__}: {error}",
                hint=f"Update or uninstall {self.distribution}.",
            ) from error
        if not callable(found):
            raise ConfigurationError(
                f"The {self.noun} {self.name!r} of {self.distribution} is a "
                f"{type(found).__name__}, which cannot be called to make one.",
                hint=f"{self.entry.value!r} must name a class or a function.",
            )
        return found  # type: ignore[no-any-return]

    def make(self, *arguments: Any) -> Any:
        """The extension itself. Raises ``ConfigurationError`` that says whose it is."""
        maker = self.loaded
        try:
            return maker(*arguments)
        except Exception as error:
            raise ConfigurationError(
                f"The {self.noun} {self.name!r} of {self.distribution} failed when it was made: "
                f"{type(error).__name__}: {error}",
                hint=f"Update or uninstall {self.distribution}.",
            ) from error


def installed(group: str) -> Iterable[EntryPoint]:
    """The entry points of ``group`` among the installed distributions."""
    return entry_points(group=group)


def extensions(
    point: ExtensionPoint, find: Callable[[str], Iterable[EntryPoint]] = installed
) -> dict[str, Extension]:
    """Every extension of ``point`` by name, the server's own first.

    Two of one name raise ``ConfigurationError`` that names both owners: which of them a run
    meant could otherwise change with the order of installation.
    """
    found: dict[str, Extension] = {}
    own = [EntryPoint(name, value, point.group) for name, value in point.builtin.items()]
    for entry in [*own, *find(point.group)]:
        owner = OURS if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
        if entry.name in found:
            raise ConfigurationError(
                f"Two distributions bring an {point.noun} {entry.name!r}: "
                f"{found[entry.name].distribution} and {owner}.",
                hint="Uninstall one of them.",
            )
        found[entry.name] = Extension(entry.name, point.noun, owner, entry)
    return found
