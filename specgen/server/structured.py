"""The seam for structured output: what asks for a form passes through here, and nowhere else."""

from __future__ import annotations

from typing import Any

from specgen.server.errors import invalid
from specgen.server.protocol import ResponseFormat

_PLUGIN = "specgen-grammar"


def check_format(response_format: ResponseFormat | None, structured_outputs: dict[str, Any] | None) -> None:
    """Raise ApiError for a form that nothing here can keep to; plain text is what every model can."""
    if response_format is not None and response_format.type != "text":
        raise unsupported(f"response_format {response_format.type!r}", "response_format")
    if structured_outputs:
        raise unsupported("structured_outputs", "structured_outputs")


def unsupported(what: str, param: str) -> Exception:
    """The answer for what needs a grammar."""
    return invalid(
        f"{what} needs the plugin {_PLUGIN}, which this server does not have", param, "unsupported_parameter"
    )


def check_tool_choice(tool_choice: str | dict[str, Any] | None) -> None:
    """Raise ApiError unless the model itself may choose whether it calls."""
    if tool_choice not in (None, "none", "auto"):
        raise unsupported(f"tool_choice {tool_choice!r}", "tool_choice")
