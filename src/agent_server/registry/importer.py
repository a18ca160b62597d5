"""Importing user files by path, under private module names, with their siblings.

A user's file may be called ``agents.py`` or ``json.py``: it must never stand in the way of the
SDK's package ``agents`` or of anything else in this process. So every file below a *root* (the
folder of a source) is a module ``_agent_server_files.<root>.<name>``, and no folder is put on
``sys.path``. What Python would do if the file were run as a script still works, because a finder
answers imports that *come from such a module*, and only those: ``import helper`` inside one is
the sibling file, under its private name. Relative imports work because a root is a package.

Leans on importlib. Refuses to know agents and tools, and never trusts a byte-code file: those are
compared by whole seconds, and a person saves twice in one second.
"""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

PREFIX = "_agent_server_files"
SDK_PACKAGE = "agents"


@dataclass(frozen=True)
class Root:
    """A folder whose files are importable by each other.

    ``beside`` is a second folder to look in: of ``my_agents/`` given as a source, its parent, so
    that ``from my_agents.tools import x`` and ``import shared`` mean what they mean to a program
    started there. ``package`` is true when the folder's ``__init__.py`` belongs to the source.
    """

    folder: Path
    beside: Path | None = None
    package: bool = False

    @property
    def module(self) -> str:
        mark = f"{self.folder}|{self.package}".encode()
        return f"{PREFIX}.r{hashlib.sha256(mark).hexdigest()[:12]}"


class _FreshLoader(SourceFileLoader):
    """Compiles the file as it is now; reads and writes no byte code."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


class _AliasLoader(Loader):
    """Lets a plain name (``helper``) be the module that already has a private one."""

    def __init__(self, target: str) -> None:
        self.target = target

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        # The import system hands out what stands in sys.modules after this returns.
        sys.modules[module.__name__] = importlib.import_module(self.target)


class SourceFinder(MetaPathFinder):
    """Answers imports from private modules, and of them. One per process, at the front."""

    def __init__(self) -> None:
        self._roots: dict[str, Root] = {}
        self._files: dict[str, Path] = {}
        self._aliases: set[str] = set()

    def install(self) -> None:
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        if PREFIX not in sys.modules:
            package = ModuleType(PREFIX, "The user's files.")
            package.__path__ = []
            sys.modules[PREFIX] = package

    def add_root(self, root: Root) -> str:
        """Make ``root`` importable; returns the name of its package."""
        self._roots[root.module] = root
        return root.module

    def module_for(self, root: Root, path: Path) -> str:
        """The private module name of a file that stands directly in ``root``."""
        package = self.add_root(root)
        if path.name == "__init__.py":
            return package
        name = f"{package}.{path.stem.replace('.', '_')}"
        if path.suffix != ".py" or "." in path.stem:
            self._files[name] = path
        return name

    def drop_aliases(self) -> None:
        """Forget the plain names, so that another root may use them for its own files."""
        for name in list(self._aliases):
            module = sys.modules.get(name)
            if module is not None and is_private(module.__name__):
                del sys.modules[name]
        self._aliases.clear()

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if is_private(fullname):
            return self._private(fullname, path)
        top, _, rest = fullname.partition(".")
        if top == SDK_PACKAGE:
            return None
        if rest:
            parent = sys.modules.get(fullname.rpartition(".")[0])
            if parent is None or not is_private(parent.__name__):
                return None
            private = f"{parent.__name__}.{fullname.rpartition('.')[2]}"
            return self._alias(fullname, private) if self._exists(private) else None
        root = self._importing_root()
        private_top = self._sibling(root, fullname) if root is not None else None
        return self._alias(fullname, private_top) if private_top else None

    def _private(self, fullname: str, path: Sequence[str] | None) -> ModuleSpec | None:
        root = self._roots.get(fullname)
        if root is not None:
            init = root.folder / "__init__.py"
            if root.package and init.is_file():
                return importlib.util.spec_from_file_location(
                    fullname,
                    init,
                    loader=_FreshLoader(fullname, str(init)),
                    submodule_search_locations=[str(root.folder)],
                )
            spec = ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = [str(root.folder)]
            return spec
        file = self._files.get(fullname)
        if file is not None:
            return importlib.util.spec_from_file_location(
                fullname, file, loader=_FreshLoader(fullname, str(file))
            )
        found = PathFinder.find_spec(fullname, path)
        if found is not None and isinstance(found.loader, SourceFileLoader) and found.origin:
            found.loader = _FreshLoader(fullname, found.origin)
            found.cached = None
        return found

    def _exists(self, private: str) -> bool:
        if private in sys.modules:
            return True
        parent = sys.modules.get(private.rpartition(".")[0])
        return parent is not None and self._private(private, list(parent.__path__)) is not None

    def _alias(self, name: str, private: str) -> ModuleSpec:
        self._aliases.add(name)
        return ModuleSpec(name, _AliasLoader(private))

    def _sibling(self, root: Root, name: str) -> str | None:
        for folder in (root.folder, root.beside):
            if folder is None:
                continue
            if folder == root.beside and name == root.folder.name:
                return root.module
            spec = PathFinder.find_spec(name, [str(folder)])
            if spec is None:
                continue
            if spec.origin is None and self._known_elsewhere(name):
                continue  # a mere folder never hides an installed package, here as in Python
            home = root if folder == root.folder else Root(folder)
            return f"{self.add_root(home)}.{name}"
        return None

    def _known_elsewhere(self, name: str) -> bool:
        others = (f for f in sys.meta_path if f is not self)
        return any(f.find_spec(name, None) is not None for f in others)

    def _importing_root(self) -> Root | None:
        """The root of the module whose import statement is being carried out."""
        frame = sys._getframe(2)
        while frame is not None:
            name = frame.f_globals.get("__name__", "")
            if not name.startswith("importlib") and name != __name__:
                parts = name.split(".")
                return self._roots.get(".".join(parts[:2])) if parts[0] == PREFIX else None
            if frame.f_back is None:
                break
            frame = frame.f_back
        return None


def is_private(module: str) -> bool:
    """Whether ``module`` is the private name of a user's file."""
    return module == PREFIX or module.startswith(PREFIX + ".")


def take_modules(prefixes: Iterable[str]) -> dict[str, ModuleType]:
    """Remove the modules at and below ``prefixes`` from ``sys.modules``, and return them."""
    wanted = tuple(prefixes)
    names = [n for n in sys.modules if any(n == p or n.startswith(p + ".") for p in wanted)]
    return {name: sys.modules.pop(name) for name in names}


def module_files(prefixes: Iterable[str]) -> set[Path]:
    """The source files of the loaded modules at and below ``prefixes``."""
    wanted = tuple(prefixes)
    found: set[Path] = set()
    for name, module in list(sys.modules.items()):
        if any(name == p or name.startswith(p + ".") for p in wanted):
            file = getattr(module, "__file__", None)
            if file:
                found.add(Path(file))
    return found


FINDER = SourceFinder()
"""The process has one import system, so it has one finder."""
