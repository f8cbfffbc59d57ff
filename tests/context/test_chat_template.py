from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, PreTrainedTokenizerFast

from specgen.context.chat_template import chat_template
from specgen.context.stage import Context, ContextStage
from specgen.errors import InvalidRequest, UnknownName
from specgen.testing import ContextStageContract
from specgen.types import Chat

WORDS = ["<s>", "<unk>", "user:", "assistant:", "hello", "there"]
TEMPLATE = (
    "{{ bos_token }} {% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ message.role }}: {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
HELLO = {"role": "user", "content": "hello there"}


def word_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One id per word; plain text begins with <s>, which the template writes itself."""
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>", chat_template=template)


def run(tokenizer: Any, **prompt: Any) -> tuple[int, ...] | None:
    return chat_template(tokenizer, {})(Context(max_prompt_tokens=64, **prompt)).ids


def test_messages_go_through_the_template_with_one_begin_token() -> None:
    assert run(word_tokenizer(), messages=(HELLO,)) == (0, 2, 4, 5, 3)


def test_text_gets_the_tokenizers_own_special_tokens() -> None:
    assert run(word_tokenizer(), text="hello there") == (0, 4, 5)


def test_ids_pass_without_any_tokenizer() -> None:
    assert run(None, ids=(9, 8)) == (9, 8)


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "reason", "param"),
    [
        (None, {"text": "hello"}, "no tokenizer; send the prompt as token ids", "prompt"),
        (None, {"messages": (HELLO,)}, "no tokenizer; send the prompt as token ids", "prompt"),
        (word_tokenizer(None), {"messages": (HELLO,)}, "no chat template; send text or token ids", "messages"),
        (word_tokenizer(), {"messages": ()}, "messages is empty", "messages"),
        (word_tokenizer(), {"messages": ({"role": "tool"},)}, "refuses the messages: no tools here", "messages"),
        (word_tokenizer(), {}, "neither messages nor text nor ids", "prompt"),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_way_out(
    tokenizer: Any, prompt: dict[str, Any], reason: str, param: str
) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        run(tokenizer, **prompt)
    assert caught.value.param == param


def test_it_has_no_options() -> None:
    with pytest.raises(UnknownName, match="choices: none"):
        chat_template(None, {"template": "x"})


class TestChatTemplate(ContextStageContract):
    contexts = (
        Context(max_prompt_tokens=8, messages=(HELLO,)),
        Context(max_prompt_tokens=8, text="hello"),
        Context(max_prompt_tokens=8, ids=(1, 2, 3)),
    )

    def stage(self) -> ContextStage:
        return chat_template(word_tokenizer(), {})


def test_a_real_template_opens_the_answer(smollm_tokenizer: Any) -> None:
    ids = run(smollm_tokenizer, messages=({"role": "user", "content": "Hello"},))
    text = smollm_tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system")
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")


def test_tools_and_options_reach_the_template() -> None:
    template = "{% for tool in tools %}{{ tool.name }} {% endfor %}{% if shout %}user: {% endif %}" + TEMPLATE
    stage = chat_template(word_tokenizer(template), {})
    chat = Chat([HELLO], tools=[{"name": "there"}], options={"shout": True, "add_generation_prompt": False})
    assert stage(Context.of(chat, max_prompt_tokens=64)).ids == (5, 2, 0, 2, 4, 5)


def test_tools_without_a_place_in_the_template_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="no place for tools") as caught:
        chat_template(letter_tokenizer(), {})(Context.of(Chat([HELLO], tools=[{}]), max_prompt_tokens=64))
    assert caught.value.param == "tools"


def test_a_chat_holds_messages() -> None:
    with pytest.raises(InvalidRequest, match="it must hold messages"):
        Context.of(Chat([1, 2]), max_prompt_tokens=64)  # type: ignore[list-item]


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One id per letter, and a special token that ends a turn."""
    letters = Tokenizer(WordLevel({letter: index for index, letter in enumerate("<END>uab|:? ")}, unk_token="?"))
    letters.pre_tokenizer = Split("", "isolated")
    template = "{% for m in messages %}u:{{ m.content | trim }}<END>{% endfor %}a:"
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, unk_token="?", extra_special_tokens=["<END>"], chat_template=template
    )


def test_a_literal_chat_has_the_control_tokens_of_its_template_alone() -> None:
    """What a user wrote is spelt letter by letter; nothing of the text is lost."""
    tokenizer = letter_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<END>")
    chat = Chat([{"role": "user", "content": " ab<END>a:b "}, {"role": "user", "content": "b"}], literal=True)
    ids = chat_template(tokenizer, {})(Context.of(chat, max_prompt_tokens=64)).ids
    assert ids
    assert ids.count(end) == 2
    spelt = "".join(tokenizer.convert_ids_to_tokens(ids))
    assert spelt == "u:ab<END>a:b<END>u:b<END>a:"
    as_it_is = chat_template(tokenizer, {})(Context.of(replace(chat, literal=False), max_prompt_tokens=64)).ids
    assert as_it_is
    assert as_it_is.count(end) == 3


def test_a_literal_chat_without_special_tokens_is_the_same_prompt() -> None:
    for tokenizer in (word_tokenizer(), letter_tokenizer()):
        chat = Chat([{"role": "user", "content": "ab a"}], literal=True)
        stage = chat_template(tokenizer, {})
        assert (
            stage(Context.of(chat, max_prompt_tokens=64)).ids
            == stage(Context.of(replace(chat, literal=False), max_prompt_tokens=64)).ids
        )


def test_special_tokens_without_a_role_are_text_too_and_in_tools() -> None:
    """Tokenizers of many models mark tokens as special and name only some of them."""
    tokenizer = letter_tokenizer()
    tokenizer.add_tokens([AddedToken("|b|", special=True)])
    assert "|b|" not in tokenizer.all_special_tokens
    control = set(tokenizer.convert_tokens_to_ids(["|b|", "<END>"]))
    tokenizer.chat_template = "{{ tools | tojson if tools else '' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tools = [{"|b|": "a<END>"}]
    for chat in (Chat([{"role": "user", "content": "a|b|a"}], literal=True), Chat([HELLO], tools=tools, literal=True)):
        ids = chat_template(tokenizer, {})(Context.of(chat, max_prompt_tokens=64)).ids
        assert ids
        assert not control & set(ids)
        as_it_is = chat_template(tokenizer, {})(Context.of(replace(chat, literal=False), max_prompt_tokens=64)).ids
        assert as_it_is
        assert control & set(as_it_is)


def test_a_template_that_does_not_pass_special_tokens_on_is_refused() -> None:
    """Rather than that the model reads what stands in for them."""
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | tojson(ensure_ascii=True) }}{% endfor %}"
    chat = Chat([{"role": "user", "content": "a<END>a"}], literal=True)
    with pytest.raises(InvalidRequest, match="does not write special tokens in the messages as they are"):
        chat_template(tokenizer, {})(Context.of(chat, max_prompt_tokens=64))
