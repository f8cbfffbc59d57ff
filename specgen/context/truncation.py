"""Cut a prompt that is too long. Nothing is cut unless the config lists this stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

import msgspec

from specgen._base.options import read_options
from specgen.context.stage import Context, ContextStage
from specgen.errors import InvalidRequest
from specgen.types import AnyTokenizer

NAME = "truncate"


class TruncateOptions(msgspec.Struct, frozen=True):
    """max_tokens: most ids that remain; None means as many as the engine takes.
    keep: how many of them come from the beginning, for a begin-of-text token or a system prompt; the rest are the
    last ones."""

    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    keep: Annotated[int, msgspec.Meta(ge=0)] = 0


def truncate(tokenizer: AnyTokenizer | None, options: Mapping[str, object]) -> ContextStage:
    """The stage that keeps the last ids of a prompt; options as in `TruncateOptions`."""
    chosen = read_options(f"context stage {NAME!r}", options, TruncateOptions)
    if chosen.max_tokens is not None and chosen.keep >= chosen.max_tokens:
        raise InvalidRequest(
            f"context stage {NAME!r}: keep is {chosen.keep}; it must be below max_tokens {chosen.max_tokens}",
            param="context",
        )
    return Truncate(chosen)


@dataclass(frozen=True, slots=True)
class Truncate:
    """Keeps the beginning that `options.keep` protects and the end; drops what lies between."""

    options: TruncateOptions

    def __call__(self, context: Context) -> Context:
        """The same prompt, cut to size. Raises InvalidRequest before a stage has made ids, and where the part to keep
        leaves no room for the end."""
        if context.ids is None:
            raise InvalidRequest(f"context stage {NAME!r} needs ids; list it after 'chat-template'", param="context")
        most = min(self.options.max_tokens or context.max_prompt_tokens, context.max_prompt_tokens)
        if len(context.ids) <= most:
            return context
        last = most - self.options.keep
        if last < 1:
            raise InvalidRequest(
                f"context stage {NAME!r} keeps the first {self.options.keep} tokens, but only {most} fit",
                param="prompt",
            )
        return replace(context, ids=context.ids[: self.options.keep] + context.ids[-last:])
