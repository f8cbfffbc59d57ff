"""Tool calls."""

from typing import Any


def tool_calls(value: Any, tokenizer: Any) -> str:
    return ""
