"""The command line, on a random model whose words are numbers. What depends on processes and signals runs in one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import specgen
from specgen.cli.acceptance_summary import Tally
from specgen.cli.app import app
from specgen.cli.chat import Conversation
from specgen.sampling.params import SamplingParams
from specgen.types import DrafterStats, Result, SpeculativeStats, Usage

Invoke = Callable[..., Any]
Install = Callable[[str, str], None]
WORDS = ("<unk>", "user", "assistant", "system", *(f"w{number}" for number in range(60)))
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}assistant"
ESCAPE = "\x1b"
HELLO = """from specgen import hookimpl


@hookimpl
def register_commands(cli):
    @cli.command()
    def {name}():
        "Say {name}."
        print("{name} says hello")
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `--model` takes: a random model that goes on until it is stopped, and a chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=8192, **shape))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=WORDS[0], chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run `specgen` in this process, with the built-ins only."""
    monkeypatch.setenv("SPECGEN_PLUGINS", "")
    return lambda *arguments, **options: CliRunner().invoke(app, list(map(str, arguments)), **options)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a plugin on the path as pip would, and lets the installed ones load."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names: list[str] = []

    def write(name: str, source: str) -> None:
        names.append(name)
        (tmp_path / f"{name}.py").write_text(source)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[specgen]\n{name} = {name}\n")
        monkeypatch.setenv("SPECGEN_PLUGINS", ",".join(names))

    yield write
    for name in names:
        sys.modules.pop(name, None)


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `specgen` in a process of its own, without a terminal."""
    command = [sys.executable, "-m", "specgen", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)


def test_generate_writes_the_text_to_stdout_and_the_figures_to_stderr(invoke: Invoke, tiny: Path) -> None:
    result = invoke("generate", "w1 w2 w3", "-m", tiny, "--max-tokens", 12)
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r" ?(\w+|<unk>)( (\w+|<unk>))*\n", result.stdout)
    assert re.match(r"12 tokens in \d+\.\d s, \d+\.\d tokens/s, acceptance length \d\.\d\d", result.stderr)
    assert re.search(r"; finish: length; seed: \d+\n$", result.stderr)


def test_generate_from_stdin_says_what_generate_from_an_argument_says(invoke: Invoke, tiny: Path) -> None:
    one = invoke("generate", "w1 w2", "-m", tiny, "--max-tokens", 5)
    other = invoke("generate", "-", "-m", tiny, "--max-tokens", 5, input="w1 w2\n")
    assert one.stdout == other.stdout != "\n"


def test_json_is_the_whole_result(invoke: Invoke, tiny: Path) -> None:
    result = invoke("generate", "w1", "-m", tiny, "--max-tokens", 6, "--temperature", 1, "--seed", 3, "--json")
    found = json.loads(result.stdout)
    assert set(found) >= {"text", "ids", "finish_reason", "usage", "tokens_per_second", "acceptance_length", "drafters"}
    assert found["seed"] == 3
    assert found["finish_reason"] == "length"
    assert len(found["ids"]) == found["usage"]["completion_tokens"] == 6
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + 6
    assert set(found["drafters"]) == {"grammar", "prediction", "prompt-lookup", "recycling"}
    assert result.stderr == ""


def test_the_text_is_the_same_whatever_drafts(invoke: Invoke, tiny: Path) -> None:
    sampled = ("--temperature", 0.9, "--top-k", 20, "--top-p", 0.9, "--min-p", 0.01, "--seed", 5)
    ways: tuple[tuple[object, ...], ...] = (
        ("--speculation", "auto"),
        ("--speculation", "off"),
        ("--speculation", '{"max_nodes": 4, "adaptive": false}'),
        ("--drafters", "prompt-lookup"),
        ("--draft-model", tiny, "--speculation", '{"adaptive": false}'),
    )
    results = [invoke("generate", "w1 w2 w1", "-m", tiny, "--max-tokens", 16, *sampled, *way) for way in ways]
    assert [result.exit_code for result in results] == [0] * len(ways)
    assert len({result.stdout for result in results}) == 1
    assert "draft-model: " in results[-1].stderr


def test_raw_and_chat_ask_differently(invoke: Invoke, tiny: Path) -> None:
    prompts = {
        way: json.loads(invoke("generate", "w1", "-m", tiny, "--max-tokens", 2, "--json", *way).stdout)["usage"]
        for way in ((), ("--chat",), ("--raw",))
    }
    assert {way: usage["prompt_tokens"] for way, usage in prompts.items()} == {(): 3, ("--chat",): 3, ("--raw",): 1}


def test_stop_ends_the_text(invoke: Invoke, tiny: Path) -> None:
    whole = invoke("generate", "w1", "-m", tiny, "--max-tokens", 8).stdout.split()
    stopped = json.loads(invoke("generate", "w1", "-m", tiny, "--max-tokens", 8, "--stop", whole[3], "--json").stdout)
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"].split() == whole[: whole.index(whole[3])]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--max-tokens", "0"), "max_tokens is 0"),
        (("--top-p", "2"), "top_p is 2.0"),
        (("--speculation", "maybe"), "choices: 'auto', 'off'"),
        (("--speculation", '{"max_nodes": 99}'), "max_nodes is 99"),
        (("--speculation", '{"depth": 9}'), "drafters, max_nodes, adaptive"),
        (("--speculation", "{"), "which is not JSON"),
        (("--drafters", "prompt-lookup,oracle"), "unknown drafter 'oracle'; choices: draft-model, grammar"),
        (("--dtype", "int3"), "dtype is 'int3'; choices: auto"),
        (("--model", "no/such/model"), "'no/such/model' cannot be loaded"),
        (("--draft-model", "no/such/model"), "'no/such/model' cannot be loaded"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(
    invoke: Invoke, tiny: Path, options: tuple[str, ...], sentence: str
) -> None:
    model = () if "--model" in options else ("--model", tiny)
    result = invoke("generate", "w1", *model, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_prompt_is_asked_for(invoke: Invoke) -> None:
    result = invoke("generate")
    assert result.exit_code == 2
    assert "PROMPT" in result.stderr


def test_a_conversation_grows_and_is_forgotten_on_request(invoke: Invoke, tiny: Path) -> None:
    lines = "w1\n\nw2\n/stats\n/reset\nw1\n/nonsense\n/quit\nw9\n"
    result = invoke("chat", "-m", tiny, "--max-tokens", 5, input=lines)
    assert result.exit_code == 0, result.output
    answers = [line.split() for line in result.stdout.splitlines()]
    assert len(answers) == 3, "one for each line that is not a command, nothing after /quit"
    assert answers[0] == answers[2] != answers[1]
    assert "10 tokens in " in result.stderr
    assert "unknown command '/nonsense': /reset" in result.stderr


def test_a_conversation_that_grows_too_long_goes_on(invoke: Invoke, tiny: Path) -> None:
    result = invoke("chat", "-m", tiny, "--max-tokens", 3, input="w1 " * 9000 + "\nw1\n")
    assert result.exit_code == 0, result.output
    assert "error: the prompt has 9002 tokens" in result.stderr
    assert len(result.stdout.splitlines()) == 1


def test_the_system_message_survives_a_reset(tiny: Path) -> None:
    with specgen.Engine.from_pretrained(tiny) as engine:
        conversation = Conversation(engine, SamplingParams(max_tokens=2), "w7")
        conversation.reset()
        conversation.answer("w1")
        assert [message["role"] for message in conversation.messages] == ["system", "user", "assistant"]
        conversation.command("/reset")
        assert conversation.messages == [{"role": "system", "content": "w7"}]


def test_control_c_cancels_the_answer_and_not_the_program(tiny: Path) -> None:
    # Without drafts, which would be through with so many tokens before the signal comes on a busy machine.
    chat = ("chat", "-m", str(tiny), "--max-tokens", "8000", "--speculation", "off")
    command = [sys.executable, "-m", "specgen", *chat]
    pipe = subprocess.PIPE
    # A group of its own, so that only this process gets the signal.
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True, text=True) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write("w1\n")
        process.stdin.flush()
        try:
            first = os.read(process.stdout.fileno(), 8)
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate("/stats\n/quit\n", timeout=60)
        finally:
            process.kill()  # harmless when it has ended; else leaving the block would wait for it
    assert process.returncode == 0, errors
    assert first
    assert rest.count("\n") == 1
    found = re.search(r"(\d+) tokens in", errors)
    assert found
    assert 0 < int(found[1]) < 8000, errors


@pytest.fixture
def lora(tiny: Path, tmp_path: Path) -> Path:
    """A folder of two adapters for the tiny model, the second of which holds a NaN."""
    from tests.support.adapters import save_adapter

    model = AutoModelForCausalLM.from_pretrained(tiny)
    save_adapter(model, tmp_path / "good", target_modules=["q_proj"])
    save_adapter(model, tmp_path / "odd", target_modules=["q_proj"], scale=float("inf"))
    return tmp_path


def test_adapters_are_listed_and_checked(invoke: Invoke, tiny: Path, lora: Path) -> None:
    result = invoke("adapters", lora, "-m", tiny)
    assert result.exit_code == 1
    good, rank, odd, refusal = result.stdout.splitlines()
    assert (good.split()[0], odd) == ("good", "odd")
    assert "rank 4" in rank
    assert "NaN" in refusal
    (alone,) = json.loads(invoke("adapters", lora / "good", "-m", tiny, "--json").stdout)
    assert (alone["folder"], alone["rank"], alone["error"]) == ("good", 4, None)
    assert alone["revision"] in good
    nothing = invoke("adapters", tiny)
    assert (nothing.exit_code, "holds no adapter_config.json" in nothing.stderr) == (2, True)


def test_generate_runs_under_an_adapter(invoke: Invoke, tiny: Path, lora: Path) -> None:
    asked = ("generate", "w1 w2 w3", "-m", tiny, "--max-tokens", 12)
    base, adapted = (invoke(*asked, *more) for more in ((), ("--adapter", lora / "good")))
    assert base.exit_code == adapted.exit_code == 0
    assert base.stdout != adapted.stdout
    assert "NaN" in invoke(*asked, "--adapter", lora / "odd").stderr


def test_plugins_are_listed_with_what_they_offer(invoke: Invoke, install: Install) -> None:
    install("acme_hello", HELLO.format(name="hello"))
    install("acme_broken", "import no_such_module\n")
    listed = {plugin["name"]: plugin for plugin in json.loads(invoke("plugins", "--json").stdout)}
    assert set(listed) == {"specgen-llm", "acme_hello", "acme_broken"}
    assert listed["specgen-llm"]["version"] == specgen.__version__
    assert "prompt-lookup" in listed["specgen-llm"]["offers"]["drafters"]
    assert "chat-template" in listed["specgen-llm"]["offers"]["context_stages"]
    assert listed["acme_hello"]["hooks"] == ["register_commands"]
    assert listed["acme_hello"]["offers"] == {"commands": ["hello"]}
    assert "no_such_module" in listed["acme_broken"]["error"]
    text = invoke("plugins").stdout
    assert "acme_hello 1.0\n  hooks: register_commands\n  commands: hello\n" in text
    assert "acme_broken 1.0\n  not loaded: ModuleNotFoundError" in text


def test_a_plugin_adds_a_command(invoke: Invoke, install: Install) -> None:
    install("acme_hello", HELLO.format(name="hello"))
    assert invoke("hello").stdout == "hello says hello\n"
    assert "Say hello." in invoke("hello", "--help").stdout
    assert invoke("goodbye").exit_code == 2


def test_two_plugins_with_one_command_are_both_named(invoke: Invoke, install: Install) -> None:
    install("acme_hello", HELLO.format(name="hello"))
    install("zeta_hello", HELLO.format(name="hello"))
    result = invoke("hello")
    assert result.exit_code == 2
    assert result.stderr == "error: command 'hello': acme_hello 1.0 and zeta_hello 1.0\n"


def test_a_plugin_cannot_replace_a_command(invoke: Invoke, install: Install) -> None:
    install("acme_chat", HELLO.format(name="chat"))
    result = invoke("hello")
    assert result.exit_code == 2
    assert "plugin acme_chat 1.0: command 'chat' is specgen's own" in result.stderr
    assert "Talk to a model." in invoke("chat", "--help").stdout


def test_demo_model_prints_nothing_but_the_folder(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepared(progress: Callable[[str], None]) -> Path:
        progress("downloading")
        return Path("/models/demo")

    monkeypatch.setattr("specgen.demo_model.demo_model", prepared)
    result = invoke("demo-model")
    assert result.stdout == f"{Path('/models/demo')}\n"
    assert result.stderr == "downloading\n"


def test_version(invoke: Invoke) -> None:
    assert invoke("--version").stdout == f"specgen {specgen.__version__}\n"
    lines = invoke("version").stdout.splitlines()
    assert lines[0] == f"specgen {specgen.__version__}"
    assert [line.split()[0] for line in lines] == ["specgen", "torch", "transformers", "triton", "python"]


def test_without_a_terminal_there_are_no_colours(tiny: Path) -> None:
    colourful = {**os.environ, "SPECGEN_PLUGINS": "", "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    done = run("generate", "w1", "-m", tiny, "--max-tokens", 4, env=colourful)
    assert done.returncode == 0, done.stderr
    assert ESCAPE not in done.stdout + done.stderr
    assert done.stderr.startswith("4 tokens in"), "transformers' progress bar belongs to terminals"
    failed = run("generate", "w1", "-m", "no/such/model", env={**colourful, "HF_HUB_OFFLINE": "1"})
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: model 'no/such/model' cannot be loaded")
    assert "Traceback" not in failed.stderr
    assert ESCAPE not in failed.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"], ["version"]])
def test_help_and_version_import_nothing_heavy(arguments: list[str]) -> None:
    # Judges the command line alone: what `import specgen` brings along is not its doing.
    stub = f"""
import sys, types
package = types.ModuleType("specgen")
package.__path__, package.__version__ = {[str(path) for path in specgen.__path__]!r}, "0"
sys.modules["specgen"] = package
from specgen.cli import main
sys.argv[1:] = {arguments!r}
try:
    main()
finally:
    print(*{{name.split(".")[0] for name in sys.modules}} & {{"torch", "transformers", "rich", "structlog", "pluggy"}})
"""
    done = subprocess.run([sys.executable, "-c", stub], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == ""


def test_a_tally_sums_answers() -> None:
    tally = Tally(seconds=2.0)
    drafters = {"lookup": DrafterStats(9, 6, 3), "idle": DrafterStats(), "odd": DrafterStats(disabled="raised")}
    stats = SpeculativeStats(5, 6, 3, by_drafter=drafters)
    result = Result("r", 0, "", tuple(range(8)), "stop", 7, Usage(1, 8), stats, 0)
    tally.add(result)
    tally.add(result)
    assert (tally.tokens, tally.tokens_per_second, tally.acceptance_length) == (16, 8.0, 1.6)
    assert str(tally) == (
        "16 tokens in 2.0 s, 8.0 tokens/s, acceptance length 1.60; "
        "lookup: 6 of 12 drafted tokens accepted; odd: switched off (raised)"
    )


def test_python_m_specgen_is_specgen() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"specgen {specgen.__version__}\n")
