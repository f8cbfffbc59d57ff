"""The contract for stages itself: each way to break it is caught, by the test that is there for it."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from specgen.context.stage import Context, ContextStage
from specgen.testing import ContextStageContract

COUNTER = itertools.count()


def edits_the_messages(context: Context) -> Context:
    for message in context.messages or ():
        message["content"] += "!"  # type: ignore[index]
    return context


@pytest.mark.parametrize(
    ("stage", "test"),
    [
        (lambda context: None, "test_a_context_comes_back"),
        (lambda context: replace(context, ids=[1]), "test_a_context_comes_back"),
        (lambda context: replace(context, ids=(1.0,)), "test_a_context_comes_back"),
        (edits_the_messages, "test_what_was_given_stays_as_it_was"),
        (lambda context: replace(context, ids=(next(COUNTER),)), "test_the_same_prompt_gives_the_same_context"),
        (lambda context: replace(context, max_prompt_tokens=999), "test_the_limit_is_not_the_stages_to_move"),
    ],
)
def test_a_broken_stage_is_caught(stage: Callable[[Context], Any], test: str) -> None:
    class Contract(ContextStageContract):
        contexts = (Context(max_prompt_tokens=8, messages=({"role": "user", "content": "hi"},)),)

        def stage(self) -> ContextStage:
            return stage

    with pytest.raises(AssertionError):
        getattr(Contract(), test)()
