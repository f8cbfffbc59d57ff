import re
from typing import Any

import msgspec
import numpy as np
import pytest

from specgen._base.options import read_options
from specgen.context.stage import Context
from specgen.errors import InvalidRequest, UnknownName


def test_a_prompt_is_text_or_ids_or_messages() -> None:
    assert Context.of("hi", max_prompt_tokens=9) == Context(max_prompt_tokens=9, text="hi")
    assert Context.of([1, 2], max_prompt_tokens=9) == Context(max_prompt_tokens=9, ids=(1, 2))
    message = {"role": "user", "content": "hi"}
    assert Context.of([message], max_prompt_tokens=9) == Context(max_prompt_tokens=9, messages=(message,))


def test_numpy_ids_become_plain_ones() -> None:
    ids = Context.of(list(np.array([1, 2])), max_prompt_tokens=9).ids
    assert ids == (1, 2)
    assert ids is not None
    assert {type(token) for token in ids} == {int}


@pytest.mark.parametrize("prompt", [[], None, 3, {}, [1, "a"], [True], [1.0], [{"role": "user"}, 1], [[1, 2]]])
def test_anything_else_is_refused_by_value(prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match="text, a list of token ids or a list of messages") as caught:
        Context.of(prompt, max_prompt_tokens=9)
    assert caught.value.param == "prompt"


class Options(msgspec.Struct):
    size: int = 1


def test_options_are_read_by_name_and_type() -> None:
    assert read_options("context stage 'mine'", {"size": 3}, Options) == Options(3)
    with pytest.raises(UnknownName, match="unknown option of context stage 'mine': 'sise'; choices: size"):
        read_options("context stage 'mine'", {"sise": 3}, Options)
    with pytest.raises(InvalidRequest, match=re.escape("context stage 'mine': size is '3'; Expected `int`, got `str`")):
        read_options("context stage 'mine'", {"size": "3"}, Options)
