from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from specgen.context.chat_template import chat_template
from specgen.context.pipeline import ContextPipeline
from specgen.context.stage import Context, ContextStage, ContextStageFactory
from specgen.context.truncation import truncate
from specgen.errors import ContextLengthExceeded, InvalidRequest, PluginError, RequestFailed, UnknownName


def appending(tokenizer: Any, options: Mapping[str, Any]) -> ContextStage:
    return lambda context: replace(context, ids=(*(context.ids or ()), options.get("token", 0)))


def breaking(tokenizer: Any, options: Mapping[str, Any]) -> ContextStage:
    return lambda context: replace(context, ids=1 // 0)  # type: ignore[arg-type]


def forgetful(tokenizer: Any, options: Mapping[str, Any]) -> ContextStage:
    return lambda context: None  # type: ignore[arg-type, return-value]


OFFERED: dict[str, ContextStageFactory] = {
    "chat-template": chat_template,
    "truncate": truncate,
    "append": appending,
    "break": breaking,
    "forget": forgetful,
}


def run(*choices: Any, limit: int = 8, **prompt: Any) -> tuple[int, ...]:
    pipeline = ContextPipeline.build(choices, OFFERED, None)
    return pipeline.run(Context(max_prompt_tokens=limit, **prompt))


def test_the_order_is_the_lists() -> None:
    first, second = ("append", {"token": 1}), ("append", {"token": 2})
    assert run("chat-template", first, second, ids=(9,)) == (9, 1, 2)
    assert run("chat-template", second, first, ids=(9,)) == (9, 2, 1)


def test_truncation_happens_only_where_it_is_listed() -> None:
    assert run("chat-template", ("truncate", {"keep": 1}), limit=3, ids=tuple(range(9))) == (0, 7, 8)
    with pytest.raises(ContextLengthExceeded, match="has 9 tokens; at most 3 fit"):
        run("chat-template", limit=3, ids=tuple(range(9)))


def test_unknown_stages_are_refused_when_the_engine_is_built() -> None:
    with pytest.raises(UnknownName, match="unknown context stage 'truncat'; choices: append, break, chat-template"):
        ContextPipeline.build(["truncat"], OFFERED, None)


@pytest.mark.parametrize("choice", [3, (), {"truncate": {}}, ("truncate", "keep"), ("truncate", {}, {})])
def test_a_choice_is_a_name_or_a_pair(choice: Any) -> None:
    with pytest.raises(InvalidRequest, match="a stage's name or a pair of name and options"):
        ContextPipeline.build([choice], OFFERED, None)
    assert run(["append", {"token": 1}], ids=(4,)) == (4, 1)


@pytest.mark.parametrize("choices", [(), ("append",)])
def test_ids_alone_need_no_stage(choices: tuple[str, ...]) -> None:
    assert run(*choices, ids=(4,))[0] == 4


def test_a_prompt_must_end_as_ids_and_not_as_none_of_them() -> None:
    with pytest.raises(InvalidRequest, match="no context stage made token ids of the prompt; stages: none"):
        run(text="hi")
    with pytest.raises(InvalidRequest, match="the prompt has no tokens"):
        run("chat-template", ids=())


def test_what_a_stage_refuses_comes_through_and_what_breaks_names_the_stage() -> None:
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        run("chat-template", text="hi")
    with pytest.raises(RequestFailed, match="context stage 'break' raised ZeroDivisionError") as caught:
        run("break", ids=(1,))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(PluginError, match="context stage 'forget' returned NoneType; it must return a Context"):
        run("forget", ids=(1,))
