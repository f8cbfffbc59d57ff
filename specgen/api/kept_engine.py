"""`specgen.generate`: one line for a model at hand, with an engine that is kept between calls."""

from __future__ import annotations

import threading
from typing import Unpack, overload

from transformers import PreTrainedModel

from specgen._base.process import at_fork
from specgen.api.engine import Engine, wrap
from specgen.sampling.keywords import SamplingOptions
from specgen.types import AnyTokenizer, Prompt, Prompts, Result

_latest: list[Engine] = []
_making = threading.RLock()
_inherited: list[object] = []


def _leave_to_parent() -> None:
    """In a forked child: engines of the parent have no thread here, and another thread may have held the lock."""
    global _making  # noqa: PLW0603
    _making = threading.RLock()
    # Not let go: memory on a device is the parent's too.
    _inherited.extend(_latest)
    _latest.clear()


at_fork(after_in_child=_leave_to_parent)


def engine_of(model: PreTrainedModel, tokenizer: AnyTokenizer | None = None) -> Engine:
    """The engine that the one-line helpers use for `model`: made once, kept until they are called for another model or
    the model has changed: an update of its weights, an adapter that is active, a hook. The caller looks no more."""
    engine = _kept(model, tokenizer)
    if engine is None:
        with _making:
            # Another thread may have made it meanwhile.
            engine = _kept(model, tokenizer) or _made(model, tokenizer)
    return engine


def _made(model: PreTrainedModel, tokenizer: AnyTokenizer | None) -> Engine:
    # The old one's memory is needed for the new one, if nobody uses it.
    _latest.clear()
    engine = wrap(model, tokenizer)
    # Who asks for it is told of a change by getting another.
    engine._shared = False
    _latest[:] = [engine]
    return engine


def _kept(model: PreTrainedModel, tokenizer: AnyTokenizer | None) -> Engine | None:
    for engine in _latest:
        if engine._model is model and tokenizer in (None, engine.tokenizer) and engine.target.change() is None:
            return engine
    return None


@overload
def generate(
    model: PreTrainedModel,
    prompt: Prompt,
    *,
    tokenizer: AnyTokenizer | None = None,
    **options: Unpack[SamplingOptions],
) -> Result: ...
@overload
def generate(
    model: PreTrainedModel,
    prompt: Prompts,
    *,
    tokenizer: AnyTokenizer | None = None,
    **options: Unpack[SamplingOptions],
) -> list[Result]: ...
def generate(
    model: PreTrainedModel,
    prompt: Prompt | Prompts,
    *,
    tokenizer: AnyTokenizer | None = None,
    **options: Unpack[SamplingOptions],
) -> Result | list[Result]:
    """`Engine.generate` for a model at hand, with an engine that is kept until another model is used."""
    return engine_of(model, tokenizer).generate(prompt, **options)
