"""Messages or text to token ids, as the target's own tokenizer does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from specgen._base.options import read_options
from specgen.context.length_bound import check_fits, length_bound, utf8_bytes
from specgen.context.special_tokens import Literals
from specgen.context.stage import Context, ContextStage
from specgen.errors import ContextLengthExceeded, InvalidRequest
from specgen.types import AnyTokenizer

NAME = "chat-template"

_MESSAGE_BYTES = 64
"""What a template writes around a message, about."""


class _NoOptions(msgspec.Struct):
    pass


def chat_template(tokenizer: AnyTokenizer | None, options: Mapping[str, object]) -> ContextStage:
    """The stage that every prompt needs: messages through the chat template, text through the tokenizer, ids as they
    are. It has no options."""
    read_options(f"context stage {NAME!r}", options, _NoOptions)
    return ChatTemplate(tokenizer)


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """`tokenizer` is a transformers tokenizer, or None when only ids can be served."""

    tokenizer: Any

    def __call__(self, context: Context) -> Context:
        """The same prompt with ids. Raises InvalidRequest when the tokenizer cannot make them."""
        if context.ids is not None:
            return context
        if self.tokenizer is None:
            raise InvalidRequest("there is no tokenizer; send the prompt as token ids", param="prompt")
        if context.messages is not None:
            return replace(context, ids=self._render(context, list(context.messages)))
        if context.text is not None:
            if context.is_last:
                check_fits(self.tokenizer, context.text, context.max_prompt_tokens, param="prompt")
            return replace(context, ids=tuple(self.tokenizer(context.text)["input_ids"]))
        raise InvalidRequest("the prompt has neither messages nor text nor ids", param="prompt")

    def _render(self, context: Context, messages: list[Any]) -> tuple[int, ...]:
        if not messages:
            raise InvalidRequest("messages is empty; send at least one", param="messages")
        template = getattr(self.tokenizer, "chat_template", "the tokenizer's own way")
        if template is None:
            raise InvalidRequest("the tokenizer has no chat template; send text or token ids", param="messages")
        if context.tools and "tools" not in str(template):
            raise InvalidRequest("the chat template of this model has no place for tools", param="tools")
        options = {"add_generation_prompt": True, **({"tools": list(context.tools)} if context.tools else {})}
        options |= dict(context.options)
        try:
            if context.is_last:
                self._check_fits(messages, options, context.max_prompt_tokens)
            return self._ids(messages, options, literal=context.literal)
        except ContextLengthExceeded:
            raise
        except Exception as error:
            # A template is a program of the model's author, run on what the user sent: whatever it raises concerns
            # this request alone.
            parts = any(isinstance(message.get("content"), list) for message in messages)
            hint = "; a content of parts is for models whose template takes them: give one string" if parts else ""
            message = f"the chat template refuses the messages: {error}{hint}"
            raise InvalidRequest(message, param="messages") from error

    def _check_fits(self, messages: list[object], options: Mapping[str, object], most: int) -> None:
        """Raise ContextLengthExceeded for a conversation that is too long by its bytes, as the template writes it: it
        may leave messages out. Short ones are not written twice."""
        size = len(messages) * _MESSAGE_BYTES + _text_bytes([messages, options.get("tools")])
        if size <= most or (bound := length_bound(self.tokenizer)) is None or size <= most * bound.longest:
            return
        written = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        check_fits(self.tokenizer, written, most, param="messages")

    def _ids(self, messages: list[object], options: Mapping[str, object], *, literal: bool) -> tuple[int, ...]:
        tools = options.get("tools")
        if literal and (literals := Literals(self.tokenizer)).stand_in([messages, tools]):
            marked, tools = literals.marked([messages, tools])
            options = {**options, **({"tools": tools} if tools else {})}
            return literals.encode(self.tokenizer.apply_chat_template(marked, tokenize=False, **options))
        # Template and tokenizer in one call: some tokenizers have no text form of a conversation.
        encoded = self.tokenizer.apply_chat_template(messages, return_dict=True, **options)
        return tuple(encoded["input_ids"])


def _text_bytes(value: object) -> int:
    """The size of all texts inside."""
    if isinstance(value, str):
        return utf8_bytes(value)
    if isinstance(value, Mapping):
        return sum(_text_bytes(inner) for inner in value.values())
    return sum(_text_bytes(inner) for inner in value) if isinstance(value, list | tuple) else 0
