"""From the options of a command to an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from specgen.cli.options import drafter_list
from specgen.cli.terminal import note, quiet_libraries

if TYPE_CHECKING:
    from specgen.api.engine import Engine
    from specgen.sampling.params import SamplingParams


def open_engine(
    model: str | None,
    *,
    dtype: str,
    device: str | None,
    gguf_file: str | None = None,
    params: SamplingParams | None = None,
    **options: Any,
) -> Engine:
    """Load the model and wrap it; the demo model if `model` is None.

    params: what will be asked of it. options: of the engine; those that are None are left to it, and drafters are names
    between commas. Raises InvalidRequest, UnsupportedModel, DrafterMismatch or PluginError, and before anything is
    loaded where the options alone say so.
    """
    quiet_libraries()
    chosen = {name: value for name, value in options.items() if value is not None}
    if (names := drafter_list(chosen.pop("drafters", None))) is not None:
        chosen["drafters"] = names
    return engine_of(model, chosen, dtype=dtype, device=device, gguf_file=gguf_file, params=params)


def engine_of(
    model: str | None,
    options: Mapping[str, object],
    *,
    dtype: str,
    device: str | None,
    gguf_file: str | None,
    params: SamplingParams | None = None,
) -> Engine:
    """As `open_engine`, with the engine's options as `EngineConfig.of` reads them."""
    from specgen.api.engine import Engine
    from specgen.api.preflight import check_options, check_speculation
    from specgen.config import EngineConfig
    from specgen.demo_model import demo_model
    from specgen.errors import InvalidRequest
    from specgen.model.loading import check_device, dtype_of
    from specgen.plugins.manager import load_plugins

    config, plugins = EngineConfig.of(options), load_plugins()
    dtype_of(dtype)
    check_device(device)
    check_options(config, plugins)
    if params is not None and params.speculation is not None:
        check_speculation(params.speculation, config)
    if model is None and gguf_file is not None:
        raise InvalidRequest(f"gguf_file is {gguf_file!r}, but no model is named; name its folder", param="gguf_file")
    return Engine.from_pretrained(
        model or demo_model(progress=note),
        dtype=dtype,
        device=device,
        gguf_file=gguf_file,
        config=config,
        plugins=plugins,
    )


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """Imports that need an extra of the distribution. Raises SpecgenError naming it where they fail."""
    from specgen.errors import SpecgenError

    try:
        yield
    except ImportError as error:
        message = f"this needs more packages: pip install 'specgen-llm[{extra}]' ({error})"
        raise SpecgenError(message) from None


def has_chat_template(engine: Engine) -> bool:
    """Whether the model was trained to converse, as far as its tokenizer says."""
    return getattr(engine.tokenizer, "chat_template", None) is not None
