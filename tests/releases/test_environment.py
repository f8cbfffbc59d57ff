"""The pins that other releases are installed by, and the line that says which of them broke something."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from tests.releases.environment import CHECKS, ROOT, blame, lowest, pinned
from tests.releases.warned import is_ours, is_shown

PRINTED = """
=================================== FAILURES ===================================
____________________________ test_the_drop_in[greedy] __________________________
.venv-newest/lib/python3.11/site-packages/transformers/generation/utils.py:2: in generate
E   specgen.errors.InvalidRequest: cache is not supported by specgen
=========================== short test summary info ============================
FAILED tests/releases/checks.py::test_the_drop_in[greedy]
ERROR tests/exactness/test_lora.py::test_a
1 failed, 20 passed in 3.21s
"""
OTHERS = {"msgspec": "0.23.0 (0.22.0 in constraints.txt)", "transformers": "5.24.0 (5.23.0 in constraints.txt)"}


def test_the_lowest_are_what_pyproject_says() -> None:
    bounds = lowest()
    assert bounds["transformers"] in (ROOT / "pyproject.toml").read_text()
    assert {"torch", "pluggy", "peft", "aiohttp", "gguf", "llguidance", "opentelemetry-api"} <= bounds.keys()


def test_each_lowest_is_pinned_at_it_or_above() -> None:
    tested = pinned()
    parts = {name: [int(part) for part in bound.split(".")] for name, bound in lowest().items()}
    assert parts.keys() <= tested.keys()
    assert not [n for n, bound in parts.items() if [int(p) for p in tested[n].split(".")[: len(bound)]] < bound]


def test_what_the_failures_speak_of_is_blamed_first() -> None:
    line = blame(PRINTED, OTHERS)
    assert line.startswith("likely transformers; differing from constraints.txt: transformers 5.24.0 (5.23.0 in ")
    assert line.endswith(
        "failed: tests/releases/checks.py::test_the_drop_in[greedy], tests/exactness/test_lora.py::test_a"
    )
    assert "\n" not in line


def test_who_is_not_spoken_of_is_listed_all_the_same() -> None:
    line = blame("ImportError: no such thing", OTHERS)
    assert line.startswith("none of the packages is named; differing from constraints.txt: msgspec 0.23.0")
    assert line.endswith("failed: pytest itself")


def test_the_checks_are_there() -> None:
    assert all(Path(ROOT, check.partition("::")[0]).exists() for check in CHECKS)


def test_a_warning_is_ours_where_a_line_of_ours_is_on_the_stack() -> None:
    ours: dict[str, Any] = {"__name__": "specgen.model.runner", "is_ours": is_ours}
    exec("def call(): return is_ours()", ours)
    assert ours["call"]()
    assert not is_ours()
    compiler: dict[str, Any] = {"__name__": "torch._dynamo.eval_frame", "call": ours["call"]}
    exec("def compiled(): return call()", compiler)
    assert compiler["compiled"](), "what it runs of ours is ours"
    ours["call"] = eval("lambda: is_ours()", {"__name__": "torch._dynamo.guards", "is_ours": is_ours})
    exec("def asks(): return call()", ours)
    assert not ours["asks"]()


def test_what_is_filtered_is_shown_to_nobody() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not is_shown("any", FutureWarning)
        warnings.simplefilter("default")
        assert is_shown("any", FutureWarning)
        warnings.filterwarnings("ignore", message="an.")
        assert not is_shown("any", FutureWarning)
        assert is_shown("one", FutureWarning)
