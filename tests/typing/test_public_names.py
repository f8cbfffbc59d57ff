"""What `import specgen` shows. A name that comes or goes is a change that users see: CHANGELOG.md says so too."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

import specgen
from specgen import EngineConfig, EngineOptions, SamplingOptions, SamplingParams

ANY = re.compile(r"\bAny\b")
NAMES = [
    "AdapterRefused",
    "Chat",
    "Coder",
    "Constraint",
    "ConstraintFactory",
    "ConstraintSetup",
    "Context",
    "ContextLengthExceeded",
    "ContextStage",
    "ContextStageFactory",
    "DraftHints",
    "DraftSession",
    "DraftTrace",
    "Drafter",
    "DrafterFactory",
    "DrafterMismatch",
    "DrafterSetup",
    "DrafterStats",
    "DuplicateName",
    "Engine",
    "EngineClosed",
    "EngineConfig",
    "EngineOptions",
    "Features",
    "Growth",
    "InvalidRequest",
    "KVFormat",
    "KVFormatFactory",
    "Levels",
    "LoadedModel",
    "LogitsProcessor",
    "LogitsProcessorFactory",
    "Logprob",
    "MAX_TREE_NODES",
    "Matcher",
    "Message",
    "ModelChanged",
    "Overloaded",
    "Plane",
    "PluginError",
    "PreparedRequest",
    "Prompt",
    "Prompts",
    "Request",
    "RequestCancelled",
    "RequestFailed",
    "Result",
    "SamplingOptions",
    "SamplingParams",
    "SpecgenError",
    "Speculation",
    "SpeculativeStats",
    "StepOutput",
    "StoppingCriterion",
    "Stream",
    "TokenTree",
    "Tokenizer",
    "UnknownName",
    "UnsupportedModel",
    "Usage",
    "Wanted",
    "WouldDeadlock",
    "__version__",
    "best_first",
    "chain",
    "custom_generate",
    "generate",
    "hookimpl",
    "linears_together",
    "load_plugins",
    "model_digest",
    "pack_linears",
    "read_options",
    "takes_options",
    "wrap",
]


def test_the_public_names_are_these() -> None:
    assert specgen.__all__ == sorted(NAMES)
    assert set(NAMES) <= set(dir(specgen))
    assert all(getattr(specgen, name) is not None for name in NAMES)


def test_keywords_are_the_fields() -> None:
    assert set(SamplingOptions.__annotations__) == set(SamplingParams.__struct_fields__)
    assert set(EngineOptions.__annotations__) == {*EngineConfig.__struct_fields__, "draft_model"}


def test_no_public_signature_holds_any() -> None:
    """Of classes their fields, methods and properties: what a user's type checker sees."""
    holding = [where for name in NAMES for where, hint in _hints(name, getattr(specgen, name)) if ANY.search(hint)]
    assert not holding


def _hints(name: str, thing: object) -> Iterator[tuple[str, str]]:
    members = vars(thing).items() if inspect.isclass(thing) else ()
    shown = [(f"{name}.{member}", value) for member, value in members if not member.startswith("_")]
    for where, value in [(name, thing), *shown]:
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        for part, hint in getattr(function, "__annotations__", {}).items():
            yield f"{where}: {part}", str(hint)


def test_the_import_is_quick() -> None:
    """torch and transformers come with the first name that needs them."""
    script = "import sys, specgen; print(specgen.__version__, {'torch', 'transformers', 'msgspec'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"{specgen.__version__} set()\n"


def test_a_name_that_is_none_is_told() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Egnine'"):
        specgen.Egnine  # type: ignore[attr-defined]  # noqa: B018
