"""Who may import whom, and a few words and statements that the package never holds. Read from the source with ast."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "specgen"

# Left may not import right. Top-level modules and folders of specgen; those in one pair of brackets do not know one
# another. Everything is looked at, imports inside functions and under TYPE_CHECKING too.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("_base", "types"),
    ("tree", "kernels", "context", "lora"),
    ("config", "kv", "sampling"),
    ("model",),
    ("draft",),
    ("engine",),
    ("plugins",),
    ("api",),
    ("testing", "demo_model", "__init__"),
    ("server", "loadtest"),
    ("cli",),
    ("__main__",),
)

# (who, whom): why all the same. Such an import cannot stand at the top of a module, it would be a circle.
EXCEPTIONS = {("plugins", "api"): "the type of an argument, never imported when it runs"}

# `testing` is for the authors of plugins, `__main__` for `python -m`.
NEVER_IMPORTED = ("testing", "__main__")

# What plugins may import of specgen: what `import specgen` shows, and the contracts that they test against.
OPEN_TO_PLUGINS = ("specgen", "specgen.testing")

FORBIDDEN_WORDS = re.compile(r"proposer|speculator(?!s)|candidate", re.IGNORECASE)


def layer_of(part: str) -> int | None:
    return next((index for index, parts in enumerate(LAYERS) if part in parts), None)


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def part_of(path: Path) -> str:
    """The top-level module or folder of specgen that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path, at_import: bool = False) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that a file imports; `from a import b` gives `a.b`.

    at_import: only the statements at the file's top, which run when it is imported.
    """
    package = path.relative_to(PACKAGE.parent).parts[:-1] if path.is_relative_to(PACKAGE) else ()
    tree = ast.parse(path.read_text(), filename=str(path))
    for node in tree.body if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def imported_parts(path: Path) -> Iterator[tuple[int, str]]:
    """(line, top-level part) of everything that a file imports from specgen; `from specgen import X` is `__init__`."""
    parts = {part_of(source) for source in sources(PACKAGE)}
    for line, name in imported_modules(path):
        head, *rest = name.split(".")
        if head == "specgen":
            yield line, rest[0] if rest and rest[0] in parts else "__init__"


def broken_rules(path: Path) -> Iterator[str]:
    own = part_of(path)
    layer = layer_of(own)
    if layer is None:
        yield f"{path.relative_to(ROOT)}: specgen.{own} has no place yet; add it to LAYERS in {Path(__file__).name}"
        return
    for line, other in imported_parts(path):
        other_layer = layer_of(other)
        # A newcomer is reported once, for its own file.
        if other == own or other_layer is None or (own, other) in EXCEPTIONS:
            continue
        if other in NEVER_IMPORTED:
            yield f"{where(path, line)}: nothing in specgen may import specgen.{other}"
        elif other_layer > layer:
            yield f"{where(path, line)}: specgen.{own} may not import specgen.{other}, which stands to its right"
        elif other_layer == layer:
            yield f"{where(path, line)}: specgen.{own} and specgen.{other} stand side by side: no import"


def test_imports_point_left() -> None:
    broken = [sentence for path in sources(PACKAGE) for sentence in broken_rules(path)]
    assert not broken, "the order of the layers is broken:\n" + "\n".join(broken)


def test_no_module_imports_itself_in_a_circle() -> None:
    """Imports that run when a module is imported. graphlib names the circle."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in sources(PACKAGE)
    }
    graph = {}
    for path in sources(PACKAGE):
        own = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        names = {name for _, name in imported_modules(path, at_import=True)}
        graph[own] = {found for name in names for found in (name, name.rpartition(".")[0]) if found in modules} - {own}
    assert list(TopologicalSorter(graph).static_order())


def test_specgen_imports_no_plugin() -> None:
    broken = [
        f"{where(path, line)}: imports {name}; plugins are found through the entry-point group, never imported"
        for path in sources(PACKAGE)
        for line, name in imported_modules(path)
        if name.split(".")[0].startswith("specgen_")
    ]
    assert not broken, "specgen imports a plugin:\n" + "\n".join(broken)


def test_plugins_import_only_public_names() -> None:
    broken = [
        f"{where(path, line)}: imports {name}; plugins may import {' and '.join(OPEN_TO_PLUGINS)}"
        for path in sources(ROOT / "plugins")
        if "tests" not in path.parts  # those look inside as they like
        for line, name in imported_modules(path)
        if name.split(".")[0] == "specgen"
        and name not in OPEN_TO_PLUGINS
        and not any(name.removeprefix(f"{module}.").isidentifier() for module in OPEN_TO_PLUGINS)
    ]
    assert not broken, "a plugin reaches inside specgen:\n" + "\n".join(broken)


def test_no_test_imports_another_test() -> None:
    """What tests share stands in tests/support."""
    broken = [
        f"{where(path, line)}: imports {name}"
        for path in sources(ROOT / "tests")
        for line, name in imported_modules(path)
        if re.search(r"(^|\.)test_\w+(\.|$)", name) and name.startswith("tests.")
    ]
    assert not broken, "a test imports another test:\n" + "\n".join(broken)


def test_the_glossary_is_kept() -> None:
    broken = [
        f"{where(path, number)}: {found.group()!r}; the words are drafter and tree"
        for suffix in ("py", "md", "html", "js")
        for path in sorted(PACKAGE.rglob(f"*.{suffix}"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        for found in FORBIDDEN_WORDS.finditer(line)
    ]
    assert not broken, "a word that is not ours:\n" + "\n".join(broken)


def test_nothing_is_asserted_or_left_unwritten() -> None:
    broken = []
    for path in sources(PACKAGE):
        for node in ast.walk(ast.parse(path.read_text())):
            # specgen.testing holds tests, for the authors of plugins.
            if isinstance(node, ast.Assert) and part_of(path) != "testing":
                broken.append(
                    f"{where(path, node.lineno)}: assert; raise an error that names the value and the choices"
                )
            if isinstance(node, ast.Name) and node.id == "NotImplementedError":
                broken.append(f"{where(path, node.lineno)}: NotImplementedError; refuse at load, by name")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("file", "source", "sentence"),
    [
        ("tree.py", "from specgen.engine.core import EngineCore", "specgen.tree may not import specgen.engine"),
        ("kernels/x.py", "def f():\n    from specgen import tree", "specgen.kernels and specgen.tree stand side"),
        ("kv/pool.py", "from ..engine.core import EngineCore", "specgen.kv may not import specgen.engine"),
        ("kv/pool.py", "from .. import engine", "specgen.kv may not import specgen.engine"),
        ("cli/__init__.py", "import specgen.testing", "nothing in specgen may import specgen.testing"),
        ("novelty.py", "", "specgen.novelty has no place yet"),
        ("engine/core.py", "from specgen import Engine", "specgen.engine may not import specgen.__init__"),
        ("kv/tiers.py", "from specgen.kv.pool import KVPool\nfrom . import pool", None),
        ("plugins/builtin.py", "from specgen.draft.x import y", None),
    ],
)
def test_the_rules_find_what_they_are_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, source: str, sentence: str | None
) -> None:
    package = tmp_path / "specgen"
    for name in ("engine/core.py", "tree.py", "testing.py", "__init__.py", "kv/pool.py", "draft/x.py", "kernels/x.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).touch()
    (package / file).parent.mkdir(exist_ok=True)
    (package / file).write_text(source)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "PACKAGE", package)
    broken = list(broken_rules(package / file))
    assert len(broken) == (sentence is not None)
    assert all(sentence in found for found in broken)
