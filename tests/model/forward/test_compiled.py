"""Compiled forwards: the same text as without, one graph for everything, and never a failure to serve."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from benchmarks.harness import PROMPTS as PROMPTS_FILE
from benchmarks.harness import read_prompts
from specgen import Engine
from specgen.errors import InvalidRequest
from specgen.kernels.cpu_backend import why_not
from specgen.model.forward import compiled
from specgen.model.forward.compiled import compile_rows
from specgen.model.runner import load_runner
from tests.support.architectures import REFUSED
from tests.support.tiny import MODELS, build

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=f"no CPU kernels: {why_not()}"),
    pytest.mark.usefixtures("one_thread"),
]

PROMPTS = ([9, 31, 40, 9, 31, 77], [5], [3, 4, 3, 4, 3, 4, 3], [88, 1, 60, 61, 9] * 9)
SETTINGS: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {"temperature": 1.0, "seed": 3})
OPTIONS: dict[str, Any] = {"kv_tokens": 1024, "drafters": ["prompt-lookup"]}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def texts(engine: Engine, *, batch: bool = True, **options: Any) -> list[tuple[int, ...]]:
    found = []
    for setting in SETTINGS:
        params = {**setting, "max_tokens": 16, **options}
        results = engine.generate(PROMPTS, **params) if batch else [engine.generate(p, **params) for p in PROMPTS]
        found += [result.ids for result in results]
    return found


# Full attention, windows, soft caps and windows, chunks with positions of their own.
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "llama4_text"])
def test_the_text_is_that_of_the_model_as_it_is(family: str) -> None:
    model = build(family)
    with Engine(model, **OPTIONS) as plain, Engine(model, compile=True, **OPTIONS) as quick:
        assert quick.target.compiled
        expected = texts(plain, batch=False, speculation="off")
        assert texts(quick, batch=False, speculation="off") == expected
        assert texts(quick) == expected
        assert texts(quick, speculation={"adaptive": False}) == expected
        quick.check()


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in MODELS if name not in REFUSED])
def test_the_text_of_every_architecture_is_that_of_the_model_as_it_is(
    family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build(family)
    with Engine(model, **OPTIONS) as plain, Engine(model, compile=True, **OPTIONS) as quick:
        assert quick.target.compiled or "forwards are not compiled" in capsys.readouterr().err
        assert texts(quick, speculation={"adaptive": False}) == texts(plain, batch=False, speculation="off")


@pytest.mark.slow
def test_the_text_of_the_real_model_is_that_of_the_model_as_it_is(smollm: Any, smollm_tokenizer: Any) -> None:
    options = {"kv_tokens": 8192, "prefix_cache": False}
    prompts = [list(prompt.ids) for prompt in read_prompts(PROMPTS_FILE, smollm_tokenizer, 8)]
    with Engine(smollm, smollm_tokenizer, **options) as plain:
        expected = [[plain.generate(p, max_tokens=48, speculation="off", **s).ids for p in prompts] for s in SETTINGS]
    with Engine(smollm, smollm_tokenizer, compile=True, **options) as quick:
        assert quick.target.compiled
        for setting, ids in zip(SETTINGS, expected, strict=True):
            assert [result.ids for result in quick.generate(prompts, max_tokens=48, **setting)] == ids
            assert [quick.generate(p, max_tokens=48, **setting).ids for p in prompts[:2]] == ids[:2]


_TWIN = """
import torch
from specgen import Engine
from tests.support.tiny import build

torch.set_num_threads(1)
with Engine(build("llama"), kv_tokens=256, compile=True) as engine:
    assert engine.target.compiled
    print(engine.generate([5, 6, 7], max_tokens=12, temperature=0).ids)
"""


_HURRIED = """
from specgen import Engine
from tests.support.tiny import build

with Engine(build("llama"), kv_tokens=256, compile="background") as engine:
    engine.generate([5, 6, 7], max_tokens=1, temperature=0)
"""


def test_a_program_may_end_while_it_compiles(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    command = [sys.executable, "-c", _HURRIED]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "terminate" not in ended.stderr


def test_two_processes_may_compile_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    command = [sys.executable, "-c", _TWIN]
    pair = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    with Engine(build("llama"), kv_tokens=256) as engine:
        expected = str(engine.generate([5, 6, 7], max_tokens=12, temperature=0).ids)
    assert [text.strip().splitlines()[-1] for text in said] == [expected] * 2


def test_drafts_and_company_change_nothing_in_bfloat16() -> None:
    model = build("llama").bfloat16()
    with Engine(model, compile=True, **OPTIONS) as engine:
        assert engine.target.compiled
        assert engine.target.batch_invariant
        alone = texts(engine, batch=False, speculation="off")
        assert texts(engine, speculation={"adaptive": False}) == alone


def test_nothing_is_compiled_again_while_requests_come_and_go() -> None:
    with Engine(build("llama"), compile=True, prefix_cache=False, **OPTIONS) as engine:
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]
        steps = engine.counters.steps
        while engine.counters.steps < steps + 200:
            streams = [
                engine.stream([token % 90 + 1 for token in range(length)], max_tokens=3 + length % 11, temperature=0)
                for length in (1, 2, 9, 30, 61)
            ]
            for stream in streams:
                stream.results()
        assert counters["stats"]["unique_graphs"] == 1


def test_it_comes_while_the_engine_serves() -> None:
    model = build("llama")
    with Engine(model, **OPTIONS) as plain:
        expected = texts(plain)
    with Engine(model, compile="background", **OPTIONS) as engine:
        assert not engine.target.batch_invariant
        deadline = time.monotonic() + 120
        while not engine.target.compiled and time.monotonic() < deadline:
            assert texts(engine) == expected
        assert engine.target.compiled
        assert texts(engine) == expected


def _refuse(model: PreTrainedModel, *rest: Any, **options: Any) -> Any:
    raise RuntimeError("no such instruction")


def test_what_cannot_be_compiled_is_served_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build("llama")
    with Engine(model, **OPTIONS) as plain:
        expected = texts(plain)
    monkeypatch.setattr(torch, "compile", _refuse)
    with Engine(model, compile=True, **OPTIONS) as engine:
        assert not engine.target.compiled
        assert texts(engine) == expected
    logged = capsys.readouterr().err
    assert "forwards are not compiled" in logged
    assert "no such instruction" in logged


def _double(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return ((rows.tanh() * 2).contiguous(),)


def _twice(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (rows.tanh() * (2 if torch.compiler.is_compiling() else 3),)


def test_a_function_of_rows_is_compiled_for_any_number_of_them() -> None:
    quick = compile_rows(_double, [(torch.ones(16, 3), 0)])
    assert quick is not _double
    for count in (1, 2, 3, 5, 16, 31):
        rows = torch.randn(count, 3)
        torch.testing.assert_close(quick(rows), _double(rows))
    assert counters["stats"]["unique_graphs"] == 1


def _crossed(ones: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return ((ones[:, None] * others[None]).sum(-1),)


def test_a_function_of_rows_may_have_any_number_in_several_dimensions() -> None:
    quick = compile_rows(_crossed, [(torch.ones(16, 16, 3), (0, 1)), (torch.ones(16, 16, 3), (0, 1))])
    assert quick is not _crossed
    for a, b, c in ((1, 1, 4), (2, 5, 2), (3, 7, 9), (16, 16, 16)):
        ones, others = torch.randn(a, c, 3), torch.randn(b, c, 3)
        torch.testing.assert_close(quick(ones, others), _crossed(ones, others))


def test_a_function_that_compiled_says_something_else_is_given_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_rows(_twice, [(torch.ones(16, 3), 0)]) is _twice
    assert "16 rows differ by" in capsys.readouterr().err


def test_a_function_that_cannot_be_compiled_is_given_back(capsys: pytest.CaptureFixture[str]) -> None:
    def waits(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (rows + 1,) if rows.sum().item() > 0 else (rows,)

    assert compile_rows(waits, [(torch.ones(16, 3), 0)]) is waits
    assert "not compiled" in capsys.readouterr().err


def test_a_compiled_forward_that_says_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    run = compiled.CompiledModel._run
    monkeypatch.setattr(compiled.CompiledModel, "_run", lambda self, *inputs: (run(self, *inputs)[0] * 1.1,))
    target = load_runner(build("llama"), kv_tokens=64, compile=True)
    assert not target.compiled


def test_a_cache_folder_that_cannot_be_written_is_no_reason_to_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("not a folder")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(occupied / "compiled"))
    model = build("llama")
    with Engine(model, **OPTIONS) as plain, Engine(model, compile=True, **OPTIONS) as engine:
        assert texts(engine) == texts(plain)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("falcon", {}, "attention is computed by 'torch-dense', it must be 'cpu'"),
        ("deepseek_v3", {}, "attention is computed by 'torch-gathered', it must be 'cpu'"),
        ("llama", {"kv_format": "int8"}, "kv_format is 'int8'"),
        ("llama", {"cpu_kernels": False}, "cpu_kernels is False"),
    ],
)
def test_the_log_says_why_not(
    name: str, options: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Engine(build(name), compile=True, batch_invariant=False, **options, **OPTIONS) as engine:
        assert not engine.target.compiled
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": "yes"}, "compile is 'yes'; choices: True, False, 'background'"),
        ({"compile": 1}, "compile is 1; choices"),
        ({"compile": "background", "batch_invariant": True}, "take compile=True"),
        ({"compile": "background", "kv_format": "int8", "batch_invariant": True}, "take compile=True"),
        ({"cpu_kernels": "no"}, "cpu_kernels is 'no'; choices: True, False"),
    ],
)
def test_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Engine(build("llama"), **options)
