"""What the documentation says is so: code runs, links lead somewhere, `--help` is what is printed, examples work.

`python -m tests.test_docs` writes the help pages of specgen/cli/README.md anew.
"""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from specgen.cli.app import app
from specgen.plugins import Plugins

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
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


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def documents() -> list[Path]:
    found = [ROOT / "CHANGELOG.md", *ROOT.glob("README.md")]
    for folder in ("specgen", "plugins", "adapters", "benchmarks"):
        found += (path for path in (ROOT / folder).rglob("*.md") if "node_modules" not in path.parts)
    return sorted(found)


def help_pages() -> str:
    """What `specgen --help` and each command's `--help` print, 80 columns wide, as markdown."""
    pages = []
    for arguments in PAGES:
        printed = CliRunner().invoke(app, [*arguments, "--help"], prog_name="specgen").stdout
        pages.append(f"### {' '.join(['specgen', *arguments])}\n\n```text\n{printed.strip()}\n```\n")
    return "\n".join(pages)


def with_help(text: str) -> str:
    return re.sub(r"(<!-- help -->\n).*(<!-- /help -->)", lambda m: f"{m[1]}\n{help_pages()}\n{m[2]}", text, flags=re.S)


def test_the_pasted_help_is_what_is_printed() -> None:
    text = CLI_README.read_text()
    assert "### specgen generate" in text
    assert text == with_help(text), "write it anew: python -m tests.test_docs"


def test_the_python_of_the_readme_runs(
    demo_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPECGEN_PLUGINS", "specgen-grammar")
    # The blocks go on from one another, as the text says; plugins are modules of their own.
    namespace: dict[str, Any] = {}
    sources = [source for source in blocks(README, "python") if "@hookimpl" not in source]
    assert len(sources) >= 5
    for number, source in enumerate(sources):
        exec(compile(source.replace(PATH, str(demo_path)), f"README.md block {number}", "exec"), namespace)
    namespace["engine"].check()
    namespace["engine"].close()
    assert " tokens per forward" in capsys.readouterr().out
    assert namespace["ids"].shape[1] == namespace["inputs"]["input_ids"].shape[1] + 16


def test_the_curl_of_the_readme_is_answered(demo_path: Path) -> None:
    """By a server around the demo model, on another port."""
    from tests.server.worlds import answered_by_curl

    (command,) = (block for block in blocks(README, "bash") if block.startswith("curl "))
    frames = answered_by_curl(command, demo_path).removesuffix("\n\n").split("\n\n")
    assert frames[-1] == "data: [DONE]"
    assert "assistant" in frames[0]


def test_the_settings_shown_are_settings() -> None:
    from specgen.config import EngineConfig
    from specgen.server.config import ServerConfig

    (shown,) = blocks((ROOT / "specgen" / "server" / "README.md").read_text(), "toml")
    found = msgspec.convert(tomllib.loads(shown), ServerConfig)
    assert EngineConfig.of(found.engine).max_running == 32


def test_the_plugin_of_the_readme_drafts_what_it_promises(smollm: Any, smollm_tokenizer: Any) -> None:
    import specgen

    (source,) = (source for source in blocks(README, "python") if "@hookimpl" in source)
    points = tomllib.loads(blocks(README, "toml")[0])["project"]["entry-points"]["specgen"]
    (name,) = points.values()
    assert f"`{name}.py`" in README
    module = ModuleType(name)
    exec(source, module.__dict__)
    plugins = Plugins()
    plugins.register(module, name)
    plugins.register(specgen.builtin, "specgen-llm")
    prompt, phrase = "Say it again: the cat sat on the mat.\nThe", "The cat sat on the mat."
    with specgen.wrap(smollm, smollm_tokenizer, plugins=plugins, drafters={"phrases": {"phrases": [phrase]}}) as engine:
        off = engine.generate(prompt, max_tokens=12, speculation="off")
        on = engine.generate(prompt, max_tokens=12, speculation={"adaptive": False})
    assert on.ids == off.ids
    assert on.stats.by_drafter["phrases"].offered > 0


def test_the_readme_lists_the_built_in_drafters_and_no_others() -> None:
    from specgen import builtin

    rows = re.findall(r"^\| `([a-z-]+)` \| [^|]+ \| [^|]+ \| [^|]+ \|$", README, flags=re.MULTILINE)
    assert set(rows) == set(builtin.drafters())


def test_the_commands_shown_exist() -> None:
    for text in (README, CLI_README.read_text()):
        shown = "\n".join(blocks(text, "bash"))
        assert set(re.findall(r"^specgen ([a-z-]+)", shown, flags=re.MULTILINE)) <= set(COMMANDS)
        targets = set(re.findall(r"^make ([a-z-]+)", shown, flags=re.MULTILINE))
        assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize("name", ["architectures", "numbers"])
def test_the_readme_has_the_places_that_are_filled_by_programs(name: str) -> None:
    assert len(re.findall(rf"^<!-- {name} -->\n(?:.*\n)+<!-- /{name} -->$", README, flags=re.MULTILINE)) == 1


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    missing = [
        link
        for link in links
        if not re.match(r"[a-z]+:|#", link) and not (document.parent / link.split("#", maxsplit=1)[0]).exists()
    ]
    assert not missing


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
