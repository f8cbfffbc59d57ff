"""The stages of one engine, in the order that its config gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from specgen._base.options import made
from specgen.context.stage import Context, ContextStage, ContextStageFactory
from specgen.errors import ContextLengthExceeded, InvalidRequest, PluginError, RequestFailed, SpecgenError, UnknownName
from specgen.types import AnyTokenizer

StageChoice: TypeAlias = "str | tuple[str, Mapping[str, object]]"
"""A stage's name, or its name and its options."""


@dataclass(frozen=True, slots=True)
class ContextPipeline:
    """Named stages, run one after the other."""

    stages: tuple[tuple[str, ContextStage], ...]

    @classmethod
    def build(
        cls, choices: Iterable[StageChoice], offered: Mapping[str, ContextStageFactory], tokenizer: AnyTokenizer | None
    ) -> ContextPipeline:
        """Make the stages that `choices` names, in that order.

        Raises UnknownName for a name that nothing offers, InvalidRequest for options that a factory refuses.
        """
        stages = []
        for choice in choices:
            name, options = _read(choice)
            if name not in offered:
                raise UnknownName("context stage", name, offered, param="context")
            make = partial(offered[name], tokenizer, options)
            stages.append((name, made(f"context stage {name!r}", options, make, param="context")))
        return cls(tuple(stages))

    def run(self, context: Context) -> tuple[int, ...]:
        """The prompt's token ids, at least one.

        Raises InvalidRequest where the prompt cannot be served, ContextLengthExceeded where it is too long, and
        RequestFailed naming the stage where a stage breaks.
        """
        for place, (name, stage) in enumerate(self.stages, start=1):
            context = _run(name, stage, replace(context, is_last=place == len(self.stages)))
        if context.ids is None:
            names = ", ".join(name for name, _ in self.stages) or "none"
            raise InvalidRequest(f"no context stage made token ids of the prompt; stages: {names}", param="context")
        if not context.ids:
            raise InvalidRequest("the prompt has no tokens; send at least one", param="prompt")
        if len(context.ids) > context.max_prompt_tokens:
            raise ContextLengthExceeded(
                f"the prompt has {len(context.ids)} tokens; at most {context.max_prompt_tokens} fit. "
                "Shorten it or list the context stage 'truncate'",
                param="prompt",
            )
        return context.ids


def _read(choice: StageChoice) -> tuple[str, Mapping[str, object]]:
    match choice:
        case str():
            return choice, {}
        case [str(name), Mapping() as options]:
            return name, options
    raise InvalidRequest(
        f"context holds {choice!r}; it must be a stage's name or a pair of name and options", param="context"
    )


def _run(name: str, stage: ContextStage, context: Context) -> Context:
    try:
        answer = stage(context)
    except SpecgenError:
        raise
    except Exception as error:
        part = f"context stage {name!r}"
        raise RequestFailed(f"{part} raised {type(error).__name__}: {error}", part=part) from error
    if not isinstance(answer, Context):
        raise PluginError(f"context stage {name!r} returned {type(answer).__name__}; it must return a Context")
    return answer
