"""`streamer=` and `tokenizer=` of `model.generate`, for a `custom_generate` of ours.

transformers takes both out of what it hands to a callable, so a streamer would never end and `stop_strings` would have
no tokenizer. Its method that sorts the arguments is extended: for a call with our callable it keeps them, for any other
call it answers what it always did.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

from transformers import GenerationMixin

from specgen._base.log import Log

log = Log("specgen.dropin")

_METHOD = "_extract_generation_mode_kwargs"
_KEPT = ("streamer", "tokenizer")


def keep_arguments_for(function: Callable[..., object]) -> None:
    """From now on `generate` hands `streamer` and `tokenizer` to `function`, or a `functools.partial` of it, given as
    its `custom_generate`. A release without that method gets a warning: what it drops is dropped."""
    method = getattr(GenerationMixin, _METHOD, None)
    if method is None:
        log.warning("this transformers hands no streamer and no tokenizer to custom_generate")
        return
    signature = inspect.signature(method)

    @wraps(method)
    def extended(*args: object, **kwargs: object) -> dict[str, object]:
        # Before the method, which takes the tokenizer out of the caller's keywords.
        given = _flat(signature.bind(*args, **kwargs).arguments)
        found: dict[str, object] = method(*args, **kwargs)
        if _unwrapped(given.get("custom_generate")) is function:
            found |= {name: given[name] for name in _KEPT if given.get(name) is not None}
        return found

    setattr(GenerationMixin, _METHOD, extended)


def _flat(arguments: Mapping[str, Any]) -> dict[str, object]:
    """The arguments, and the caller's keywords among them as arguments too."""
    return {**arguments.get("kwargs", {}), **arguments}


def _unwrapped(function: object) -> object:
    while isinstance(function, partial):
        function = function.func
    return function
