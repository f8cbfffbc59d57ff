"""The documentation as its tests read it: the pages, their code blocks and their tables."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def scripts(text: str) -> list[str]:
    """The Python to run; plugins are modules of their own."""
    return [source for source in blocks(text, "python") if "@hookimpl" not in source]


def prose(text: str) -> str:
    """All but the fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def tables(text: str) -> list[list[dict[str, str]]]:
    """Each table as its rows, by the column's heading."""
    found = []
    for table in re.findall(r"(?:^\|.*\|\n)+", prose(text), flags=re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines())
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def table(text: str, *columns: str) -> list[dict[str, str]]:
    """The rows of the one table that has these columns."""
    (found,) = (rows for rows in tables(text) if list(rows[0]) == list(columns))
    return found


def named(rows: list[dict[str, str]], column: str) -> list[str]:
    """A column of names, without their backticks."""
    return [row[column].strip("`") for row in rows]


def documents() -> list[Path]:
    """Every page of the repository."""
    found = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / ".github" / "CONTRIBUTING.md"]
    for folder in ("docs", "specgen", "plugins", "adapters", "benchmarks"):
        found += (path for path in (ROOT / folder).rglob("*.md") if "node_modules" not in path.parts)
    return sorted(found)
