"""plugins/README.md: every hook has its section, and what it shows to paste runs."""

import inspect
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from specgen.context.stage import Context
from specgen.draft.drafter import DrafterSetup, DraftHints
from specgen.plugins import hookspecs
from specgen.plugins.manager import Plugins
from specgen.sampling.constraint import ConstraintSetup
from specgen.testing import MatcherContract

README = (Path(__file__).parents[2] / "plugins" / "README.md").read_text()
SECTIONS = re.split(r"^### ", README, flags=re.MULTILINE)[1:]
HOOKS = Plugins().hooks


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def heading(hook: str) -> str:
    signature = inspect.signature(getattr(hookspecs, hook))
    arguments = ", ".join(f"{name}: {parameter.annotation}" for name, parameter in signature.parameters.items())
    return f"`{hook}({arguments}) -> {signature.return_annotation}`"


def execute(source: str, name: str) -> ModuleType:
    module = ModuleType(name)
    exec(compile(source, name, "exec"), module.__dict__)
    return module


def run_tests(contract: type[Any]) -> None:
    tests: list[Callable[[Any], None]] = [
        test for name, test in inspect.getmembers(contract) if name.startswith("test_")
    ]
    assert tests
    for test in tests:
        test(contract())


def registered(module: ModuleType | object) -> Plugins:
    plugins = Plugins()
    plugins.register(module, "pasted")
    return plugins


def test_the_sections_are_the_hooks_by_their_exact_signatures() -> None:
    assert sorted(section.splitlines()[0] for section in SECTIONS) == sorted(map(heading, HOOKS))


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_says_in_its_docstring_when_it_is_called(hook: str) -> None:
    assert "Called" in (inspect.getdoc(getattr(hookspecs, hook)) or "")


def test_the_pasteable_plugin_is_short_and_keeps_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    project, (source, test, *_) = blocks(README, "toml")[0], blocks(README, "python")
    assert sum(len(block.splitlines()) for block in (project, source, test)) <= 60
    points = tomllib.loads(project)["project"]["entry-points"][hookspecs.PROJECT]
    (name,) = points.values()
    module = execute(source, name)
    monkeypatch.setitem(sys.modules, name, module)
    run_tests(execute(test, "test_successor").TestSuccessor)
    factory = registered(module).collect("drafters")["successor"]
    session = factory(DrafterSetup(vocab_size=10)).open([1, 2, 3, 1], DraftHints())
    assert session.propose(4).tokens == (2, 3, 1, 2)


def built(folder: Path, files: dict[str, str]) -> zipfile.ZipFile:
    """The wheel that `pip install -e .` makes of a folder with these files, by the same backend."""
    pytest.importorskip("setuptools", minversion="71")
    for name, text in files.items():
        (folder / name).write_text(text)
    script = "from setuptools import build_meta; print(build_meta.build_editable('dist'))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(folder / "dist" / done.stdout.splitlines()[-1])


@pytest.mark.parametrize("readme", ["docs/plugins.md", "plugins/README.md"])
def test_the_recipe_installs_as_it_is_written(readme: str, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / readme).read_text()
    (project,) = (block for block in blocks(text, "toml") if "[project.entry-points.specgen]" in block)
    (module,) = tomllib.loads(project)["project"]["entry-points"][hookspecs.PROJECT].values()
    source = next(block for block in blocks(text, "python") if "@hookimpl" in block)
    tests = [block for block in blocks(text, "python") if f"from {module} import" in block]
    files = {"pyproject.toml": project, f"{module}.py": source}
    wheel = built(tmp_path, files | {f"test_{number}.py": test for number, test in enumerate(tests)})
    (points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert f"= {module}\n" in wheel.read(points).decode()
    (top_level,) = (name for name in wheel.namelist() if name.endswith("top_level.txt"))
    assert wheel.read(top_level).decode().split() == [module], "tests are not installed"


def test_nothing_is_to_be_installed_by_a_name_that_no_index_has() -> None:
    """specgen and its plugins are installed from folders; extras of what is installed go by name."""
    root = Path(__file__).parents[2]
    named = re.compile(r"pip install (?:-[\w-]+ )*['\"]?(specgen[\w-]*)(?!.*\[)")
    texts = [*root.glob("*.md"), *(root / "plugins").rglob("*.md"), *(root / "specgen").rglob("*.py")]
    wrong = [f"{path.name}: {found[0]}" for path in texts for found in named.finditer(path.read_text())]
    assert not wrong


def pasted(hook: str) -> ModuleType:
    (section,) = (section for section in SECTIONS if section.startswith(f"`{hook}("))
    (source,) = blocks(section, "python")
    return execute(source, hook)


def test_the_context_stage_shown_runs() -> None:
    stage = registered(pasted("context_stages")).collect("context_stages")["shout"](None, {})
    assert stage(Context(max_prompt_tokens=9, text="hi")).text == "HI"


def test_the_logits_processor_shown_runs() -> None:
    torch = pytest.importorskip("torch")
    factory = registered(pasted("logits_processors")).collect("logits_processors")["only-even"]
    processed = factory(None, weight=5.0)(torch.tensor([[1]]), torch.zeros(1, 4))
    assert processed.tolist() == [[0.0, -5.0, 0.0, -5.0]]


def test_the_constraint_shown_runs() -> None:
    pytest.importorskip("torch")
    letters = ModuleType("letters")
    letters.decode = lambda ids: "abcde"[ids[0]]  # type: ignore[attr-defined]
    factory = registered(pasted("constraints")).collect("constraints")["without"]
    matcher = factory(ConstraintSetup(letters, 5), "e")
    assert matcher.allowed().tolist() == [True, True, True, True, False]
    assert matcher.permitted([0, 1, 4, 2]) == 2
    run_tests(type("Lipogram", (MatcherContract,), {"matcher": lambda self: factory(ConstraintSetup(letters, 5), "e")}))


def test_the_command_shown_runs() -> None:
    typer, runner = pytest.importorskip("typer"), pytest.importorskip("typer.testing").CliRunner()
    cli = typer.Typer()
    registered(pasted("register_commands")).call("register_commands", cli=cli)
    assert runner.invoke(cli, []).stdout == "hello\n"


async def test_the_routes_shown_answer() -> None:
    app = web.Application()
    engine = ModuleType("engine")
    engine.load = ModuleType("load")  # type: ignore[attr-defined]
    engine.load.running = 3
    registered(pasted("register_routes")).call("register_routes", app=app, engine=engine)
    async with TestClient(TestServer(app)) as client, client.get("/load") as answer:
        assert await answer.json() == {"running": 3}


def test_the_observer_shown_runs() -> None:
    watcher = pasted("on_finish").AcceptanceLog()
    finished = ModuleType("result")
    finished.stats = ModuleType("stats")  # type: ignore[attr-defined]
    finished.stats.mean_acceptance_length = 3.5  # type: ignore[attr-defined]
    registered(watcher).notify("on_finish", result=finished)
    assert watcher.lengths == [3.5]
