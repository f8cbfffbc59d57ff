"""A text that cannot fit is known by its bytes, and no text that fits is ever taken for one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from specgen.context.chat_template import ChatTemplate
from specgen.context.length_bound import length_bound
from specgen.context.pipeline import ContextPipeline
from specgen.context.stage import Context
from specgen.context.truncation import Truncate, TruncateOptions
from specgen.errors import ContextLengthExceeded
from tests.support.tokenizers import byte_level, sentence_piece

TEXT = "the cat sat on the mat, the dog did not; \u00e9\u00e8 \u6f22\u5b57 12345 " * 4


def normalised(normalizer: Any) -> PreTrainedTokenizerFast:
    found = copy.deepcopy(byte_level(400, TEXT))
    found.backend_tokenizer.normalizer = normalizer
    return found


def with_added(**options: bool) -> PreTrainedTokenizerFast:
    found = byte_level(400, TEXT)
    found.add_tokens([AddedToken("<a rather long token>", **options)])
    return found


def with_pieces(**options: Any) -> PreTrainedTokenizerFast:
    """BPE over characters, as Llama's."""
    letters = {letter: number for number, letter in enumerate(["<unk>", *"abc\u2581", "ab", "\u2581ab"])}
    for byte in range(256):
        letters[f"<0x{byte:02X}>"] = len(letters)
    backend = Tokenizer(models.BPE(letters, [("a", "b"), ("\u2581", "ab")], unk_token="<unk>", **options))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


LETTERS = bytes_to_unicode()


def without_letters(*absent: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of a few merges that has never seen some bytes, as SmolLM2's: it leaves them out."""
    vocabulary = {letter: number for number, letter in enumerate(LETTERS[b] for b in range(256) if b not in absent)}
    for token in ("ab", "abab"):
        vocabulary[token] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("ab", "ab")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def without_letters_but_normalised() -> PreTrainedTokenizerFast:
    found = without_letters(4, 0xF1)
    found.backend_tokenizer.normalizer = normalizers.NFC()
    return found


BOUNDED: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes": lambda: byte_level(400, TEXT),
    "NFC": lambda: normalised(normalizers.NFC()),
    "NFKC and small": lambda: normalised(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    "replaced": lambda: normalised(normalizers.Replace("the cat", "c")),
    "strips": lambda: with_added(lstrip=True, rstrip=True),
    "pieces": lambda: with_pieces(byte_fallback=True, fuse_unk=True),
    "pieces without bytes": lambda: with_pieces(fuse_unk=False),
    "bytes without some": lambda: without_letters(4, 0x20, 0xE6, 0xF1),
}
UNBOUNDED: dict[str, Callable[[], Any]] = {
    "strip": lambda: normalised(normalizers.Strip()),
    "accents": lambda: normalised(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
    "BERT": lambda: normalised(normalizers.BertNormalizer()),
    "an expression": lambda: normalised(normalizers.Replace(Regex(" +"), " ")),
    "deleted": lambda: normalised(normalizers.Replace("a", "")),
    "fused unknowns": lambda: with_pieces(fuse_unk=True),
    "bytes without some, normalised": without_letters_but_normalised,
    "words": lambda: PreTrainedTokenizerFast(tokenizer_object=splitting(pre_tokenizers.Whitespace())),
    "removed": lambda: PreTrainedTokenizerFast(tokenizer_object=splitting(pre_tokenizers.Split(" ", "removed"))),
    "none": lambda: None,
}


def splitting(splitter: Any) -> Tokenizer:
    backend: Tokenizer = copy.deepcopy(byte_level(400, TEXT).backend_tokenizer)
    backend.pre_tokenizer = pre_tokenizers.Sequence([splitter, backend.pre_tokenizer])
    return backend


HARD = [
    "the cat",
    "<a rather long token>",
    " " * 9,
    "\u2003",
    "\u212a",
    "e\u0301",
    "\u1100\u1161\u11a8",
    "\u6f22",
    "\u0344",
    "\x04" * 7,
    "\U00050000",
]
MADE = {name: make() for name, make in BOUNDED.items()}


@pytest.mark.parametrize("name", BOUNDED)
@settings(max_examples=60, deadline=None)
@given(text=st.one_of(st.text(), st.lists(st.sampled_from([*HARD, "a", "ab", "<|end|>", "\U0001d400"])).map("".join)))
def test_no_text_has_fewer_tokens_than_its_bytes_say(name: str, text: str) -> None:
    bound = length_bound(MADE[name])
    assert bound is not None
    assert bound.tokens(text) <= len(MADE[name].encode(text, add_special_tokens=False))


@pytest.mark.parametrize("name", UNBOUNDED)
def test_where_any_text_may_become_short_nothing_is_said(name: str) -> None:
    assert length_bound(UNBOUNDED[name]()) is None


def test_what_a_tokenizer_leaves_out_counts_for_nothing() -> None:
    bound = length_bound(without_letters(4))
    assert bound is not None
    assert bound.tokens("\x04" * 1000) == 0
    assert bound.tokens("\x04ab" * 1000) == 2000 // 4


def test_the_longest_token_counts_and_may_be_added_later() -> None:
    tokenizer = byte_level(400, TEXT)
    longest = max(len(token) for token in tokenizer.get_vocab() if token not in ("<|end|>", "<|user|>"))
    assert length_bound(tokenizer).longest == max(longest, len("<|user|>"))  # type: ignore[union-attr]
    tokenizer.add_tokens(["x" * 50])
    assert length_bound(tokenizer).longest == 50  # type: ignore[union-attr]


class Untouched:
    """A tokenizer's back-end must not be asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        encode = PreTrainedTokenizerFast._encode_plus

        def counted(*arguments: Any, **options: Any) -> Any:
            self.asked += 1
            return encode(*arguments, **options)

        monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", counted)


TEMPLATE = "{% for m in messages if m.role != 'note' %}<|user|>{{ m.content }}<|end|>{% endfor %}"


def pipeline(tokenizer: Any, *more: Any) -> ContextPipeline:
    return ContextPipeline((("chat-template", ChatTemplate(tokenizer)), *more))


@pytest.mark.parametrize("literal", [False, True])
def test_what_cannot_fit_is_refused_before_it_is_tokenised(literal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level(400, TEXT)
    tokenizer.chat_template = TEMPLATE
    untouched = Untouched(monkeypatch)
    chats = [{"role": "user", "content": "a b <|end|>" * 10_000}], [{"role": "user", "content": "a"}] * 2_000
    for chat in chats:
        with pytest.raises(ContextLengthExceeded, match="bytes, at least .* tokens; at most 99 fit") as caught:
            pipeline(tokenizer).run(Context(max_prompt_tokens=99, messages=tuple(chat), literal=literal))
        assert caught.value.param == "messages"
    with pytest.raises(ContextLengthExceeded, match="30000 bytes, at least .* tokens; at most 99 fit") as caught:
        pipeline(tokenizer).run(Context(max_prompt_tokens=99, text="a b" * 10_000))
    assert caught.value.param == "prompt"
    assert untouched.asked == 0


def test_what_the_template_leaves_out_does_not_count() -> None:
    tokenizer = byte_level(400, TEXT)
    tokenizer.chat_template = TEMPLATE
    chat = ({"role": "note", "content": "a" * 100_000}, {"role": "user", "content": "hi"})
    ids = pipeline(tokenizer).run(Context(max_prompt_tokens=99, messages=chat))
    assert tokenizer.decode(ids) == "<|user|>hi<|end|>"


def test_what_a_later_stage_cuts_is_not_refused() -> None:
    tokenizer = byte_level(400, TEXT)
    cut = pipeline(tokenizer, ("truncate", Truncate(TruncateOptions())))
    assert cut.run(Context(max_prompt_tokens=9, text="x" * 5_000)) == tuple(tokenizer.encode("x" * 5_000))[-9:]


def test_sentence_piece_never_refuses_what_fits() -> None:
    """A unigram model that falls back on bytes."""
    tokenizer = sentence_piece(120, TEXT)
    bound = length_bound(tokenizer)
    assert bound is None or bound.tokens(TEXT * 9) <= len(tokenizer.encode(TEXT * 9))
