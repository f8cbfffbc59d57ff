"""From the options of a command to an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from specgen.cli.options import drafter_list
from specgen.cli.terminal import note, quiet_libraries

if TYPE_CHECKING:
    from specgen.api import Engine


def open_engine(
    model: str | None,
    *,
    dtype: str,
    device: str | None,
    draft_model: str | None,
    drafters: str | None,
    **options: Any,
) -> Engine:
    """Load the model and wrap it; the demo model if `model` is None. options: others of the engine.

    Raises InvalidRequest, UnsupportedModel, DrafterMismatch or PluginError.
    """
    quiet_libraries()
    from specgen.api import Engine
    from specgen.model.demo import demo_model

    chosen: dict[str, Any] = {"draft_model": draft_model, **options}
    if (names := drafter_list(drafters)) is not None:
        chosen["drafters"] = names
    return Engine.from_pretrained(model or demo_model(progress=note), dtype=dtype, device=device, **chosen)


def has_chat_template(engine: Engine) -> bool:
    """Whether the model was trained to converse, as far as its tokenizer says."""
    return getattr(engine.tokenizer, "chat_template", None) is not None
