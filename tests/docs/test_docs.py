"""What the documentation says is so: code runs, links lead somewhere, `--help` is what is printed, examples work.

`python -m tests.docs.test_docs` writes the help pages of specgen/cli/README.md anew.
"""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from specgen.cli.app import app
from specgen.plugins.manager import Plugins
from tests.support.documents import DOCS, README, ROOT, blocks, documents, named, prose, scripts, table

CLI_README = ROOT / "specgen" / "cli" / "README.md"
FUNCTIONS: list[Any] = [info.callback for info in app.registered_commands]
GROUPS: dict[str, Any] = {info.name: info.typer_instance for info in app.registered_groups}
COMMANDS = [*(function.__name__.replace("_", "-") for function in FUNCTIONS), *GROUPS]
PAGES = [[], *([name] for name in COMMANDS)] + [
    [name, info.callback.__name__] for name, group in GROUPS.items() for info in group.registered_commands
]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
SLOW = {"demo.py"}
# What an example prints when it has shown what it is for.
SAYS = {
    "adapters.py": "swapped: True",
    "batch.py": "'speculation': 'off'",
    "dropin.py": "identical: True",
    "generate.py": " forwards",
    "prediction.py": "identical: True",
    "stream.py": "Count from 1 | '1'",
}
PATH = "path/to/model"
MOST_LINES = 300
CONTEXT = 512


def help_page(arguments: list[str]) -> str:
    return CliRunner().invoke(app, [*arguments, "--help"], prog_name="specgen").stdout


def help_pages() -> str:
    """What `specgen --help` and each command's `--help` print, 80 columns wide, as markdown."""
    pages = (f"### {' '.join(['specgen', *page])}\n\n```text\n{help_page(page).strip()}\n```\n" for page in PAGES)
    return "\n".join(pages)


def with_help(text: str) -> str:
    return re.sub(r"(<!-- help -->\n).*(<!-- /help -->)", lambda m: f"{m[1]}\n{help_pages()}\n{m[2]}", text, flags=re.S)


def execute(sources: list[str], name: str, namespace: dict[str, Any], model: Path) -> None:
    for number, source in enumerate(sources):
        exec(compile(source.replace(PATH, str(model)), f"{name} block {number}", "exec"), namespace)


@dataclass(frozen=True, slots=True)
class Begun:
    """What the README's first block has made and printed: what other blocks go on with."""

    names: Mapping[str, Any]
    printed: str


@pytest.fixture(scope="module")
def model_path(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a short context, since KV pools are as large as contexts, and pages make several engines."""
    folder = tmp_path_factory.mktemp("short") / demo_path.name
    folder.mkdir()
    for file in demo_path.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((demo_path / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
    return folder


@pytest.fixture(scope="module")
def begun(model_path: Path) -> Iterator[Begun]:
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setenv("SPECGEN_PLUGINS", "specgen-grammar")
        execute(scripts(README)[:1], "README.md", names, model_path)
    yield Begun(names, printed.getvalue())
    names["engine"].close()


def test_the_pasted_help_is_what_is_printed() -> None:
    text = CLI_README.read_text()
    assert "### specgen generate" in text
    assert text == with_help(text), "write it anew: python -m tests.docs.test_docs"


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= MOST_LINES


def test_the_python_of_the_readme_runs(
    begun: Begun, model_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPECGEN_PLUGINS", "specgen-grammar")
    names = dict(begun.names)
    sources = scripts(README)[1:]
    assert len(sources) >= 4
    execute(sources, "README.md", names, model_path)
    names["engine"].check()
    assert " tokens per forward" in begun.printed
    assert capsys.readouterr().out
    assert names["ids"].shape[1] == names["inputs"]["input_ids"].shape[1] + 16


@pytest.mark.parametrize("page", [page for page, text in DOCS.items() if scripts(text)])
def test_the_python_of_the_docs_runs(
    begun: Begun, model_path: Path, monkeypatch: pytest.MonkeyPatch, page: str
) -> None:
    monkeypatch.setenv("SPECGEN_PLUGINS", "specgen-grammar")
    monkeypatch.chdir(ROOT)
    execute(scripts(DOCS[page]), page, dict(begun.names), model_path)
    begun.names["engine"].check()


def test_the_curl_of_the_readme_is_answered(demo_path: Path) -> None:
    """By a server around the demo model, on another port."""
    from tests.support.servers import answered_by_curl

    (command,) = (block for block in blocks(README, "bash") if block.startswith("curl "))
    frames = answered_by_curl(command, demo_path).removesuffix("\n\n").split("\n\n")
    assert frames[-1] == "data: [DONE]"
    assert "assistant" in frames[0]


def test_the_settings_shown_are_settings() -> None:
    from specgen.config import EngineConfig
    from specgen.server.config import ServerConfig

    (shown,) = blocks((ROOT / "specgen" / "server" / "README.md").read_text(), "toml")
    found = msgspec.convert(tomllib.loads(shown), ServerConfig)
    assert EngineConfig.of(found.engine).max_num_seqs == 32


def test_the_plugin_shown_drafts_what_it_promises(smollm: Any, smollm_tokenizer: Any) -> None:
    import specgen

    page = DOCS["plugins.md"]
    (source,) = (source for source in blocks(page, "python") if "@hookimpl" in source)
    points = tomllib.loads(blocks(page, "toml")[0])["project"]["entry-points"]["specgen"]
    (name,) = points.values()
    assert f"`{name}.py`" in page
    module = ModuleType(name)
    exec(source, module.__dict__)
    plugins = Plugins()
    plugins.register(module, name)
    plugins.register(specgen.plugins.builtin, "specgen-llm")
    prompt, phrase = "Say it again: the cat sat on the mat.\nThe", "The cat sat on the mat."
    with specgen.wrap(smollm, smollm_tokenizer, plugins=plugins, drafters={"phrases": {"phrases": [phrase]}}) as engine:
        off = engine.generate(prompt, max_tokens=12, speculation="off")
        on = engine.generate(prompt, max_tokens=12, speculation={"adaptive": False})
    assert on.ids == off.ids
    assert on.stats.by_drafter["phrases"].offered > 0


def test_the_commands_shown_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for text in (README, CLI_README.read_text(), *DOCS.values()):
        lines = [line.split("#")[0] for block in blocks(text, "bash") for line in block.splitlines()]
        for command, rest in (found for line in lines for found in re.findall(r"^specgen ([a-z-]+)(.*)", line)):
            assert command in COMMANDS
            assert set(re.findall(r"\s(--[a-z-]+|-[a-z])\b", rest)) <= set(re.findall(r"-[\w-]+", help_page([command])))
        assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.MULTILINE)) <= targets


def test_what_is_installed_is_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(named(table(README, "extra", "for"), "extra")) == set(extras)
    for text in map(Path.read_text, documents()):
        assert {name for names in re.findall(r"'\.\[([\w,]+)\]'", text) for name in names.split(",")} <= set(extras)
        folders = re.findall(r"pip install (\./\S*[\w-])", text)
        assert all((ROOT / folder / "pyproject.toml").exists() for folder in folders)


def test_the_modules_shown_are_there() -> None:
    for document in documents():
        for module in re.findall(r"python -m ((?:benchmarks|tests|adapters)[\w.]*\w)", document.read_text()):
            place = ROOT / module.replace(".", "/")
            assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), f"{document}: {module}"


def anchors(text: str) -> set[str]:
    """What a link may name behind `#`: the headings as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(document: Path) -> None:
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(document.read_text())):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if re.match(r"[a-z]+:", link):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            missing.append(link)
    assert not missing


def test_every_page_is_in_the_index() -> None:
    assert set(re.findall(r"\]\((\w+\.md)\)", DOCS["README.md"])) == set(DOCS) - {"README.md"}
    assert "(docs/README.md)" in README


def test_every_example_is_in_the_readme() -> None:
    assert set(re.findall(r"\(examples/(\w+\.py)\)", README)) == set(EXAMPLES)
    assert set(SAYS) == set(EXAMPLES) - SLOW


@pytest.mark.parametrize("name", sorted(SAYS))
def test_the_example_runs(
    demo_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setenv("SPECGEN_PLUGINS", "")
    source = ROOT / "examples" / name
    assert len(source.read_text().splitlines()) <= 30
    runpy.run_path(str(source), run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out


@pytest.mark.slow
def test_the_demo_runs(demo_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "demo.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("identical: yes") == 10


if __name__ == "__main__":
    CLI_README.write_text(with_help(CLI_README.read_text()))
