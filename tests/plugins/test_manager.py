"""The door. Entry points are faked by dist-info folders on sys.path, so discovery runs as it does for a user."""

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

import pytest
from structlog.testing import capture_logs

import specgen
from specgen.errors import DuplicateName, PluginError, UnknownName
from specgen.plugins.hookspecs import hookimpl
from specgen.plugins.manager import ALLOW_LIST, PluginInfo, Plugins, load_plugins

Install = Callable[..., None]
HEAD = "from specgen.plugins.hookspecs import hookimpl\n"
DRAFTERS = HEAD + "@hookimpl\ndef drafters():\n    return {{{name!r}: list}}\n"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Only what a test installs is there, besides a built-in drafter `prompt-lookup`."""
    built_in = ModuleType("specgen.plugins.builtin")
    exec(DRAFTERS.format(name="prompt-lookup"), built_in.__dict__)
    monkeypatch.setattr("specgen.plugins.manager.builtin", built_in)
    monkeypatch.delenv(ALLOW_LIST, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("specgen.plugins.manager.entry_points", lambda group: _entry_points_below(tmp_path, group))
    modules = []

    def write(name: str, version: str, source: str, *, points: int = 1) -> None:
        modules.append(module := name.replace("-", "_"))
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = [f"point{index} = {module}" for index in range(points)]
        (info / "entry_points.txt").write_text("\n".join(["[specgen]", *lines, ""]))

    yield write
    for module in modules:
        sys.modules.pop(module, None)


def _entry_points_below(folder: Path, group: str) -> list[EntryPoint]:
    """What importlib finds, less what the machine that runs the tests has installed."""
    found = entry_points(group=group)
    return [point for point in found if point.dist and Path(str(point.dist.locate_file(""))) == folder]


def names(plugins: Plugins) -> set[str]:
    return {info.name for info in plugins.info() if info.error is None}


def offered(plugins: Plugins) -> dict[str, object]:
    return dict(plugins.collect("drafters"))


def test_built_ins_and_installed_plugins_come_through_one_door(install: Install) -> None:
    install("acme-drafts", "1.2", DRAFTERS.format(name="acme"))
    plugins = load_plugins()
    assert set(plugins.collect("drafters")) == {"prompt-lookup", "acme"}
    assert plugins.provenance("drafters", "acme") == "acme-drafts 1.2"
    assert plugins.provenance("drafters", "prompt-lookup") == f"specgen-llm {specgen.__version__}"
    assert PluginInfo("acme-drafts", "1.2", ("drafters",)) in plugins.info()
    assert plugins.collect("context_stages") == {}


def test_a_name_offered_twice_names_both_distributions(install: Install) -> None:
    install("specgen-suffix", "0.2", DRAFTERS.format(name="suffix"))
    install("acme-suffix", "1.0", DRAFTERS.format(name="suffix"))
    with pytest.raises(DuplicateName, match=r"^drafter 'suffix': acme-suffix 1\.0 and specgen-suffix 0\.2$"):
        load_plugins().collect("drafters")


def test_a_built_in_cannot_be_replaced_in_silence(install: Install) -> None:
    install("acme", "1.0", DRAFTERS.format(name="prompt-lookup"))
    with pytest.raises(DuplicateName, match=r"specgen-llm.* and acme 1\.0"):
        load_plugins().collect("drafters")


@pytest.mark.parametrize("source", ["import no_such_module", "1 +", "raise RuntimeError('out of order')"])
def test_a_broken_import_is_logged_listed_and_skipped(install: Install, source: str) -> None:
    install("acme-broken", "3.1", source)
    install("acme-sound", "1.0", DRAFTERS.format(name="sound"))
    with capture_logs() as logs:
        plugins = load_plugins()
    assert [entry["log_level"] for entry in logs] == ["warning"]
    assert "acme-broken 3.1" in logs[0]["reason"]
    assert names(plugins) == {"specgen-llm", "acme-sound"}
    (broken,) = (info for info in plugins.info() if info.error)
    assert (broken.name, broken.version, broken.hooks) == ("acme-broken", "3.1", ())


def test_a_broken_import_of_a_required_plugin_is_an_error_with_its_cause(install: Install) -> None:
    install("acme-broken", "3.1", "import no_such_module")
    with pytest.raises(PluginError, match=r"acme-broken 3\.1 .*no_such_module") as caught:
        load_plugins(required=["acme_broken"])
    assert isinstance(caught.value.__cause__, ImportError)


def test_a_required_plugin_must_be_there_and_allowed(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("acme", "1.0", DRAFTERS.format(name="acme"))
    assert names(load_plugins(required=["Acme"])) == {"specgen-llm", "acme"}
    with pytest.raises(PluginError, match="required plugin other is not installed; plugins that may load: acme"):
        load_plugins(required=["other"])
    monkeypatch.setenv(ALLOW_LIST, "")
    with pytest.raises(PluginError, match="required plugin acme is not allowed; plugins that may load: none"):
        load_plugins(required=["acme"])


@pytest.mark.parametrize(
    ("variable", "only", "loaded"),
    [
        (None, None, {"acme-one", "acme-two"}),
        ("", None, set()),
        ("acme-one", None, {"acme-one"}),
        (" Acme_Two , acme.one", None, {"acme-one", "acme-two"}),
        (None, ["acme-two"], {"acme-two"}),
        (None, [], set()),
        ("acme-one", ["acme-two"], set()),
    ],
)
def test_the_environment_and_the_caller_both_restrict(
    install: Install, monkeypatch: pytest.MonkeyPatch, variable: str | None, only: list[str] | None, loaded: set[str]
) -> None:
    install("acme-one", "1.0", DRAFTERS.format(name="one"))
    install("acme-two", "1.0", DRAFTERS.format(name="two"))
    if variable is not None:
        monkeypatch.setenv(ALLOW_LIST, variable)
    assert names(load_plugins(only=only)) == loaded | {"specgen-llm"}


def test_what_is_not_allowed_is_not_even_imported(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("acme-hostile", "1.0", "raise SystemExit('imported')")
    monkeypatch.setenv(ALLOW_LIST, "")
    assert names(load_plugins()) == {"specgen-llm"}


def test_a_misspelt_allow_list_is_logged(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("acme", "1.0", DRAFTERS.format(name="acme"))
    monkeypatch.setenv(ALLOW_LIST, "acmee")
    with capture_logs() as logs:
        load_plugins()
    assert logs[0]["plugins"] == ["acmee"]
    assert logs[0]["installed"] == ["acme"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("@hookimpl\ndef drafterz():\n    return {}\n", "unknown hook 'drafterz'"),
        ("@hookimpl\ndef drafters(vocabulary):\n    return {}\n", "'vocabulary'"),
        ("@hookimpl(wrapper=True)\ndef drafters():\n    return (yield)\n", "'drafters' cannot be a wrapper"),
    ],
)
def test_a_broken_hook_is_an_error_naming_plugin_and_hooks(install: Install, source: str, reason: str) -> None:
    install("acme", "1.0", HEAD + source)
    with pytest.raises(PluginError) as caught:
        load_plugins()
    assert str(caught.value).startswith("plugin acme 1.0: ")
    assert reason in str(caught.value)
    assert "on_step" in str(caught.value)


def test_two_entry_points_of_one_distribution_are_refused(install: Install) -> None:
    install("acme", "1.0", DRAFTERS.format(name="acme"), points=2)
    with pytest.raises(PluginError, match=r"plugin acme 1\.0: acme 1\.0 is registered under that name"):
        load_plugins()


def offering(answer: object) -> object:
    class Plugin:
        @hookimpl
        def drafters(self) -> object:
            if isinstance(answer, Exception):
                raise answer
            return answer

    return Plugin()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "returned NoneType; it must return name -> factory"),
        (["echo"], "returned list"),
        ({"echo": "not a factory"}, "offers 'echo': 'not a factory'"),
        ({"": list}, "offers ''"),
        ({3: list}, "offers 3"),
        (RuntimeError("no luck"), "raised RuntimeError: no luck"),
    ],
)
def test_a_hook_that_answers_nonsense_names_the_plugin(answer: object, reason: str) -> None:
    plugins = Plugins()
    plugins.register(offering(answer), "mine", version="2.0")
    with pytest.raises(PluginError) as caught:
        plugins.collect("drafters")
    assert str(caught.value).startswith("plugin mine 2.0: hook 'drafters' ")
    assert reason in str(caught.value)


def test_an_object_is_registered_directly_and_once() -> None:
    plugins, plugin = Plugins(), offering({"mine": list})
    plugins.register(plugin, "mine")
    assert offered(plugins) == {"mine": list}
    assert plugins.provenance("drafters", "mine") == "mine"
    with pytest.raises(PluginError, match="registered under that name"):
        plugins.register(offering({}), "mine")
    with pytest.raises(PluginError, match="plugin other"):
        plugins.register(plugin, "other")
    assert offered(plugins) == {"mine": list}


def test_a_refused_object_leaves_nothing_behind() -> None:
    class Misspelt:
        @hookimpl
        def drafters(self) -> dict[str, object]:
            return {"half": list}

        @hookimpl
        def on_stepp(self) -> None: ...

    plugins = Plugins()
    with pytest.raises(PluginError, match="on_stepp"):
        plugins.register(Misspelt(), "mine")
    assert offered(plugins) == {}
    assert plugins.info() == []
    plugins.register(offering({"mine": list}), "mine")
    assert offered(plugins) == {"mine": list}


def test_unknown_names_list_the_choices() -> None:
    plugins = Plugins()
    plugins.register(offering({"mine": list}), "mine")
    with pytest.raises(UnknownName, match="unknown drafter 'echo'; choices: mine"):
        plugins.provenance("drafters", "echo")
    with pytest.raises(UnknownName, match="unknown hook 'on_step'; choices: constraints, context_stages, drafters"):
        plugins.collect("on_step")  # type: ignore[call-overload]


class Watcher:
    def __init__(self, *, fail: bool) -> None:
        self.fail = fail
        self.seen: list[object] = []

    @hookimpl
    def on_step(self, outputs: object) -> None:
        self.seen.append(outputs)
        if self.fail:
            raise RuntimeError("observer out of order")

    @hookimpl
    def on_finish(self) -> None:
        self.seen.append("finished")


def test_an_observer_that_raises_is_counted_logged_once_and_isolated() -> None:
    plugins, broken, sound = Plugins(), Watcher(fail=True), Watcher(fail=False)
    plugins.register(broken, "broken", version="0.9")
    plugins.register(sound, "sound")
    with capture_logs() as logs:
        for step in range(3):
            plugins.notify("on_step", outputs=step)
        plugins.notify("on_finish", result=None)
    assert broken.seen == sound.seen == [0, 1, 2, "finished"]
    assert plugins.failures == {"broken": 3}
    assert [(entry["plugin"], entry["hook"]) for entry in logs] == [("broken 0.9", "on_step")]
    assert isinstance(logs[0]["exc_info"], RuntimeError)


def test_a_command_that_cannot_be_registered_names_its_plugin() -> None:
    class Commands:
        @hookimpl
        def register_commands(self, cli: list[str]) -> None:
            cli.append("hello")

    plugins, cli = Plugins(), list[str]()
    plugins.register(Commands(), "mine")
    plugins.call("register_commands", cli=cli)
    assert cli == ["hello"]
    with pytest.raises(PluginError, match="plugin mine: hook 'register_commands' raised AttributeError"):
        plugins.call("register_commands", cli=None)
