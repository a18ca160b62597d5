"""Which files hold agents: what ``AGENT_SERVER_AGENTS`` names, and how each is imported.

Leans on the importer. Refuses to look into the modules it imports: it turns each file into a
module, or into an error that names file and line.
"""

import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from agent_server.domain.agents import LoadError
from agent_server.registry.importer import FINDER, SDK_PACKAGE, Root, is_private

DEFAULTS = ("agents.py", "agents")
_LIBRARIES = tuple(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib"))
_OURS = frozenset({SDK_PACKAGE, "agent_server", "openai", "pydantic"})


@dataclass(frozen=True)
class Unit:
    """One file (or installed module) that is loaded, fails and is kept on its own."""

    module: str
    place: str
    """How people are told where it is: a path relative to the working folder, or a module."""
    file: Path | None = None


@dataclass(frozen=True)
class Failure:
    """Why a unit was not loaded, and the files that had a part in it: to edit one may mend it."""

    error: LoadError
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Group:
    """Units that can import each other, and so are loaded again together.

    ``prefixes`` are the module names that a reload takes out of ``sys.modules``; ``folders`` are
    the sources that are folders: each new file there belongs to the group.
    """

    key: str
    units: tuple[Unit, ...]
    prefixes: tuple[str, ...]
    folders: tuple[Path, ...]


@dataclass(frozen=True)
class Sources:
    """What a specification stands for at this moment."""

    groups: tuple[Group, ...]
    errors: tuple[LoadError, ...]
    """What it names and cannot be found."""
    policy_folders: tuple[Path, ...]
    watched: tuple[Path, ...]
    """Folders in which a change may matter, besides those of loaded modules."""


def place(path: Path, cwd: Path) -> str:
    """``path`` as people read it: relative where it stands below ``cwd``."""
    try:
        return str(path.relative_to(cwd))
    except ValueError:
        return str(path)


def find_sources(spec: str | None, cwd: Path) -> Sources:
    """Resolve a comma-separated list of files, folders and modules.

    None looks for ``agents.py`` and ``agents/`` in ``cwd``; to find neither is no error.
    """
    roots: dict[Root, list[Unit]] = {}
    installed: dict[str, list[Unit]] = {}
    errors: list[LoadError] = []
    policies: list[Path] = []
    watched: list[Path] = []
    if spec is None:
        names = [name for name in DEFAULTS if (cwd / name).exists()]
        watched.append(cwd)
    else:
        names = [part.strip() for part in spec.split(",") if part.strip()]
    for name in names:
        path = Path(os.path.abspath(cwd / Path(name).expanduser()))
        if not path.exists() and not _looks_like_path(name):
            found = _module_in(name, cwd)
            if found is None:
                installed.setdefault(name.partition(".")[0], []).append(Unit(name, name))
                policies.append(cwd)
                continue
            if name.partition(".")[2] or found.name == "__init__.py":
                module = f"{FINDER.add_root(Root(cwd))}.{name}"
                roots.setdefault(Root(cwd), []).append(Unit(module, place(found, cwd), found))
                policies += [found.parent, cwd]
                continue
            path = found
        if path.is_dir():
            root = Root(path, beside=path.parent, package=(path / "__init__.py").is_file())
            files = _files_in(path)
            if not files:
                message = f"The folder {name!r} holds no Python file. Put a file with an Agent in."
                errors.append(LoadError(source=name, message=message))
        elif path.is_file():
            root = Root(path.parent)
            files = [path]
        else:
            message = (
                f"AGENT_SERVER_AGENTS names {name!r}, and {place(path, cwd)!r} does not exist. "
                f"Name a file, a folder or a module; paths are relative to {str(cwd)!r}."
            )
            errors.append(LoadError(source=name, message=message))
            watched.append(path.parent)
            continue
        policies.append(root.folder)
        units = roots.setdefault(root, [])
        for file in files:
            unit = Unit(FINDER.module_for(root, file), place(file, cwd), file)
            if unit not in units:
                units.append(unit)
    groups = _grouped(roots) + [_installed_group(top, units) for top, units in installed.items()]
    for group in groups:
        watched += group.folders
        watched += [unit.file.parent for unit in group.units if unit.file is not None]
    return Sources(
        tuple(groups),
        tuple(errors),
        tuple(dict.fromkeys([*policies, cwd])),
        tuple(dict.fromkeys([*watched, *policies])),
    )


def import_unit(unit: Unit, cwd: Path) -> ModuleType | Failure:
    """Import ``unit``; whatever its code raises becomes the error. Runs off the event loop."""
    try:
        return importlib.import_module(unit.module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module may raise SystemExit, and that ends no server
        frames = traceback.extract_tb(error.__traceback__)
        files = [Path(frame.filename) for frame in frames if Path(frame.filename).is_file()]
        if isinstance(error, SyntaxError) and error.filename:
            files.append(Path(error.filename))
        return Failure(_load_error(unit, error, cwd), tuple(files))


def in_library(path: Path) -> bool:
    """Whether ``path`` is Python's own or an installed package's, which nobody edits."""
    return any(path.is_relative_to(folder) for folder in _LIBRARIES)


def _looks_like_path(name: str) -> bool:
    return name.endswith(".py") or os.sep in name or "/" in name


def _module_in(name: str, cwd: Path) -> Path | None:
    base = cwd.joinpath(*name.split("."))
    for candidate in (base.with_name(base.name + ".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _files_in(folder: Path) -> list[Path]:
    """The files of a folder that may hold agents, its package file first."""
    found = []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith((".", "_")):
            entry = entry / "__init__.py"
            if entry.is_file() and entry.parent.name.isidentifier():
                found.append(entry)
        elif entry.suffix == ".py" and entry.is_file():
            skipped = entry.name.startswith(("_", "test_")) or entry.name == "conftest.py"
            if not skipped or entry.name == "__init__.py":
                found.append(entry)
    own = folder / "__init__.py"
    return sorted(found, key=lambda file: (file != own, file))


def _grouped(roots: dict[Root, list[Unit]]) -> list[Group]:
    shared: dict[Path, dict[Root, list[Unit]]] = {}
    for root, units in roots.items():
        shared.setdefault(root.beside or root.folder, {})[root] = units
    groups = []
    for key, members in shared.items():
        prefixes = [root.module for root in members] + [Root(key).module]
        groups.append(
            Group(
                key=str(key),
                units=tuple(unit for units in members.values() for unit in units),
                prefixes=tuple(dict.fromkeys(prefixes)),
                folders=tuple(root.folder for root in members if root.beside is not None),
            )
        )
    return groups


def _installed_group(top: str, units: list[Unit]) -> Group:
    """A module that is not below the working folder. Reloaded only where a person edits it."""
    folders: tuple[Path, ...] = ()
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is not None and spec.origin and top not in _OURS:
        folder = Path(spec.origin).parent
        if not in_library(folder):
            folders = (folder,)
    return Group(f"module:{top}", tuple(units), (top,) if folders else (), folders)


def _load_error(unit: Unit, error: BaseException, cwd: Path) -> LoadError:
    frames = traceback.extract_tb(error.__traceback__)
    own = str(unit.file) if unit.file else getattr(sys.modules.get(unit.module), "__file__", None)
    lines = [frame.lineno for frame in frames if frame.filename == own]
    line = lines[-1] if lines else None
    if isinstance(error, SyntaxError):
        where = error.filename or ""
        text = f"{type(error).__name__}: {error.msg}"
        if where == own or not lines:
            line = error.lineno
        if where and where != own:
            text += f" ({place(Path(where), cwd)}, line {error.lineno})"
        return LoadError(source=unit.place, line=line, message=f"{text}.")
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return LoadError(source=unit.place, line=line, message=_with_advice(text, error, frames))


def _with_advice(text: str, error: BaseException, frames: Sequence[traceback.FrameSummary]) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        top = error.name.partition(".")[0]
        if is_private(error.name):
            wanted = error.name.split(".", 2)[-1]
            return f"No module {wanted!r} stands beside this file. Check its name and folder."
        if top == SDK_PACKAGE and error.name != top:
            return (
                f"No module named {error.name!r}: `agents` is the Agents SDK here. Import a file "
                f"beside this one as `from .{error.name.partition('.')[2]} import …`."
            )
        return (
            f"No module named {error.name!r}. Install the package that has it into the server's "
            f"environment (often `uv pip install {top}`), or put {top}.py beside this file."
        )
    script = isinstance(error, SystemExit) or any(
        frame.name in {"run", "run_sync"} and Path(frame.filename).name in {"runners.py", "run.py"}
        for frame in frames
    )
    if script:
        text = text.rstrip(".")
        return f"{text}. Put what runs as a script below `if __name__ == '__main__':`."
    return text
