"""specgen: any Hugging Face causal LM generates several tokens per forward, and not one token of its output changes.

import specgen

engine = specgen.Engine.from_pretrained("path/to/model")
print(engine.generate("The capital of France is", max_tokens=16).text)
"""

import ast
from importlib import import_module
from pathlib import Path

from specgen._base.version import __version__ as __version__

# What a name needs is imported when it is first asked for (PEP 562): torch and transformers take seconds, a command's
# help none. Names and homes stand once, in the stub that type checkers read.
_HOMES = {
    alias.name: node.module
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom) and node.module is not None
    for alias in node.names
}
__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'specgen' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
