from typing import Any

import pytest

from specgen.context.stage import Context, ContextStage
from specgen.context.truncation import truncate
from specgen.errors import InvalidRequest, UnknownName
from specgen.testing import ContextStageContract


def run(length: int, limit: int, **options: Any) -> tuple[int, ...] | None:
    return truncate(None, options)(Context(max_prompt_tokens=limit, ids=tuple(range(length)))).ids


@pytest.mark.parametrize(
    ("length", "limit", "options", "kept"),
    [
        (5, 5, {}, (0, 1, 2, 3, 4)),
        (5, 3, {}, (2, 3, 4)),
        (5, 9, {"max_tokens": 2}, (3, 4)),
        (5, 2, {"max_tokens": 4}, (3, 4)),
        (6, 4, {"keep": 1}, (0, 3, 4, 5)),
        (6, 9, {"max_tokens": 3, "keep": 2}, (0, 1, 5)),
        (2, 9, {"max_tokens": 3, "keep": 2}, (0, 1)),
    ],
)
def test_the_end_stays_and_what_is_protected_of_the_beginning(
    length: int, limit: int, options: dict[str, Any], kept: tuple[int, ...]
) -> None:
    assert run(length, limit, **options) == kept


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"keep": -1}, {"max_tokens": 2, "keep": 2}, {"keep": "1"}])
def test_options_out_of_range_are_refused_when_the_stage_is_made(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="^context stage 'truncate'"):
        truncate(None, options)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(UnknownName, match="choices: keep, max_tokens"):
        truncate(None, {"max_token": 3})


def test_it_needs_ids_and_room_for_the_end() -> None:
    with pytest.raises(InvalidRequest, match="list it after 'chat-template'"):
        truncate(None, {})(Context(max_prompt_tokens=4, text="hi"))
    with pytest.raises(InvalidRequest, match="keeps the first 4 tokens, but only 4 fit"):
        run(9, 4, keep=4)


class TestTruncate(ContextStageContract):
    contexts = tuple(Context(max_prompt_tokens=4, ids=tuple(range(length))) for length in (1, 4, 9))

    def stage(self) -> ContextStage:
        return truncate(None, {"keep": 1})
