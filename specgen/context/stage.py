"""What a context stage is: one step between what a user sent and the token ids that the target reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeAlias

from specgen.errors import InvalidRequest
from specgen.types import Message, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """A prompt on its way to token ids; a stage answers with a changed copy (`dataclasses.replace`).

    Exactly one of `messages`, `text`, `ids` is set at first; the last stage must leave `ids`. What was set before may
    stay: where ids are set they are the prompt. `max_prompt_tokens` is the most that the engine can take.
    """

    max_prompt_tokens: int
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    ids: tuple[int, ...] | None = None

    @classmethod
    def of(cls, prompt: Prompt, *, max_prompt_tokens: int) -> Context:
        """Read what a user may send: text, a list of token ids, or a list of messages.

        Raises InvalidRequest for anything else and for an empty list.
        """
        if isinstance(prompt, str):
            return cls(max_prompt_tokens=max_prompt_tokens, text=prompt)
        items: tuple[Any, ...] = tuple(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, bytes) else ()
        if not items:
            raise InvalidRequest(f"the prompt is {prompt!r}; it must be {_CHOICES}", param="prompt")
        if all(isinstance(item, Mapping) for item in items):
            return cls(max_prompt_tokens=max_prompt_tokens, messages=items)
        for item in items:
            if not isinstance(item, Integral) or isinstance(item, bool):
                raise InvalidRequest(f"the prompt holds {item!r}; it must be {_CHOICES}", param="prompt")
        return cls(max_prompt_tokens=max_prompt_tokens, ids=tuple(map(int, items)))


_CHOICES = "text, a list of token ids or a list of messages, not empty"

ContextStage: TypeAlias = Callable[[Context], Context]
"""Called on the thread that submits the request, possibly on several at once: keep no state that a call changes.

Raise InvalidRequest, with `param`, for a prompt that cannot be served.
"""

ContextStageFactory: TypeAlias = Callable[[Any, Mapping[str, Any]], ContextStage]
"""`factory(tokenizer, options)`, called once when the engine is built. `tokenizer` is None when the engine has none;
`options` are what the config says, and a factory refuses unknown ones by name."""
