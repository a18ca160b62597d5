"""Resolve every dependency anew and write the versions into pyproject.toml as constraints.

Leans on `uv pip compile --universal`, so that one list holds for every supported Python, with
markers where they differ. Refuses to write a lock file: that would name download addresses.

    uv run python scripts/refresh_pins.py           # take the newest versions
    uv run python scripts/refresh_pins.py --check   # fail if a dependency has no pin
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
BLOCK = re.compile(r"^constraint-dependencies = \[\n.*?^\]\n", re.MULTILINE | re.DOTALL)
OLDEST = "3.10"
"""The oldest Python that pins are resolved for; `requires-python` says the same."""
SECTION = "[tool.uv]\n"
PIN = re.compile(r"^([A-Za-z0-9._-]+)==")


def normal(name: str) -> str:
    """``name`` as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(pyproject: str) -> list[str]:
    """One line per pinned package: the dependencies, the ``dev`` extra, the ``clients`` group."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "pyproject.toml"
        source.write_text(BLOCK.sub("", pyproject), encoding="utf-8")
        answer = subprocess.run(
            ["uv", "pip", "compile", "--universal", "--python-version", OLDEST, "--extra", "dev"]
            + ["--group", "clients", "--no-header", "--no-annotate", "--quiet", "pyproject.toml"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    if answer.returncode != 0:
        raise SystemExit(f"uv could not resolve the dependencies:\n{answer.stderr}")
    return [line.strip() for line in answer.stdout.splitlines() if PIN.match(line)]


def with_pins(pyproject: str, pins: list[str]) -> str:
    """``pyproject`` with ``pins`` as its constraints, the rest as it was."""
    quoted = "".join(f'    "{pin.replace(chr(34), chr(39))}",\n' for pin in pins)
    block = f"constraint-dependencies = [\n{quoted}]\n"
    if BLOCK.search(pyproject):
        return BLOCK.sub(lambda _: block, pyproject)
    if SECTION in pyproject:
        return pyproject.replace(SECTION, SECTION + block)
    return f"{pyproject.rstrip()}\n\n{SECTION}{block}"


def unpinned(pyproject: str) -> list[str]:
    """The direct dependencies that no constraint pins."""
    block = BLOCK.search(pyproject)
    pins = {
        normal(found.group(1))
        for line in (block.group(0).splitlines() if block else [])
        if (found := PIN.match(line.strip().strip('",')))
    }
    named: set[str] = set()
    for name in ("dependencies", "dev", "clients"):
        listed = re.search(rf"^{name} = \[\n(.*?)^\]", pyproject, re.MULTILINE | re.DOTALL)
        for line in listed.group(1).splitlines() if listed else []:
            if found := re.match(r'\s*"([A-Za-z0-9._-]+)', line):
                named.add(normal(found.group(1)))
    return sorted(named - pins)


def main() -> None:
    text = PYPROJECT.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        missing = unpinned(text)
        if missing:
            raise SystemExit(f"No pin for {', '.join(missing)}: run scripts/refresh_pins.py.")
        return
    pins = resolve(text)
    PYPROJECT.write_text(with_pins(text, pins), encoding="utf-8")
    print(f"{len(pins)} pins written to {PYPROJECT.name}.")


if __name__ == "__main__":
    main()
