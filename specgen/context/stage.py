"""What a context stage is: one step between what a user sent and the token ids that the target reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, TypeAlias

from specgen.errors import InvalidRequest, check_text
from specgen.types import AnyTokenizer, Chat, Message, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """A prompt on its way to token ids; a stage answers with a changed copy (`dataclasses.replace`).

    Exactly one of `messages`, `text`, `ids` is set at first; the last stage must leave `ids`. What was set before may
    stay: where ids are set they are the prompt. `tools`, `options` and `literal` belong to the messages, as in `Chat`.
    `max_prompt_tokens` is the most that the engine can take. `is_last`: no stage behind this one may shorten the ids.
    """

    max_prompt_tokens: int
    messages: tuple[Message, ...] | None = None
    tools: tuple[Mapping[str, object], ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    literal: bool = False
    text: str | None = None
    ids: tuple[int, ...] | None = None
    is_last: bool = False

    @classmethod
    def of(cls, prompt: Prompt, *, max_prompt_tokens: int) -> Context:
        """Read what a user may send: text, a list of token ids, a list of messages, or a `Chat`.

        Raises InvalidRequest for anything else and for an empty list.
        """
        if isinstance(prompt, str):
            check_text(prompt, "the prompt holds", param="prompt")
            return cls(max_prompt_tokens=max_prompt_tokens, text=prompt)
        if isinstance(prompt, Chat):
            chat = cls.of(list(prompt.messages), max_prompt_tokens=max_prompt_tokens)
            if chat.messages is None:
                raise InvalidRequest("a Chat holds token ids; it must hold messages", param="messages")
            return replace(chat, tools=tuple(prompt.tools), options=prompt.options, literal=prompt.literal)
        items: tuple[Any, ...] = tuple(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, bytes) else ()
        if not items:
            raise InvalidRequest(f"the prompt is {prompt!r}; it must be {_CHOICES}{_hint(prompt)}", param="prompt")
        if all(isinstance(item, Mapping) for item in items):
            return cls(max_prompt_tokens=max_prompt_tokens, messages=items)
        for item in items:
            if not isinstance(item, Integral) or isinstance(item, bool):
                raise InvalidRequest(f"the prompt holds {item!r}; it must be {_CHOICES}{_hint(item)}", param="prompt")
        return cls(max_prompt_tokens=max_prompt_tokens, ids=tuple(map(int, items)))


_CHOICES = "text, a list of token ids or a list of messages, not empty"


def _hint(value: object) -> str:
    """How what is no prompt becomes one."""
    if isinstance(value, Mapping) and "input_ids" in value:
        return "; of what a tokenizer returns give `input_ids`, as a list"
    if isinstance(value, Mapping) and "role" in value:
        return "; one message is a list of one"
    if hasattr(value, "tolist"):
        return "; give its `tolist()`"
    return ""


ContextStage: TypeAlias = Callable[[Context], Context]
"""Called on the thread that submits the request, possibly on several at once: keep no state that a call changes.

Raise InvalidRequest, with `param`, for a prompt that cannot be served.
"""

ContextStageFactory: TypeAlias = "Callable[[AnyTokenizer | None, Mapping[str, object]], ContextStage]"
"""`factory(tokenizer, options)`, called once when the engine is built. `tokenizer` is None when the engine has none;
`options` are what the config says, and a factory refuses unknown ones by name."""
