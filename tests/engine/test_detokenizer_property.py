"""The text is a function of the ids: whatever tokens a model writes, in whatever steps, behind whatever prompt."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders
from transformers import AddedToken, ByT5Tokenizer, PreTrainedTokenizerBase

from specgen.engine.detokenizer import IncrementalDetokenizer
from specgen.server.token_text import Spelling, Texts
from specgen.types import Logprob
from tests.support.tokenizers import byte_level, sentence_piece, word_piece

HALF = "\N{REPLACEMENT CHARACTER}"
SPEECH = (
    "The quick brown fox, isn't it? a b c 12. Größe, naïve; 日本語 😀👩‍👩‍👧 ñ \ufffd\n\n  def f(x):\n\treturn x ! " * 3
)
FAMILY = "a é\n日😀👩‍👩‍👧  \ufffd"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True)

codecs.register_error("each byte", lambda error: (HALF * (error.end - error.start), error.end))  # type: ignore[attr-defined]


def _with_added(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.add_tokens(["<tool>", "  two", " x "])
    tokenizer.add_tokens([AddedToken("<ctl>", special=True)], special_tokens=True)
    return tokenizer


def _keeping_space(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """As in Gemma: no space is taken from the beginning of a text."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer._tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


MADE: dict[str, Callable[[], Any]] = {
    "byte-level": lambda: byte_level(400, SPEECH),
    "byte-level, tokens added": lambda: _with_added(byte_level(400, SPEECH)),
    "byte fallback": lambda: sentence_piece(120, SPEECH),
    "byte fallback, tokens added": lambda: _with_added(sentence_piece(120, SPEECH)),
    "byte fallback, first space kept": lambda: _keeping_space(sentence_piece(120, SPEECH)),
    "word pieces": lambda: word_piece(120, SPEECH),
    "bytes, broken ones left out": ByT5Tokenizer,
}


@lru_cache
def tokenizer_of(name: str) -> Any:
    return MADE[name]()


def decoded(tokenizer: Any, ids: Sequence[int], skip: bool) -> str:
    """What the tokenizer decodes, which is well defined but for runs of byte tokens that are not UTF-8 as a whole."""
    if "<0x00>" not in tokenizer.get_vocab():
        return str(tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False))
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special and skip}
    runs = [b""]
    for piece in tokenizer.convert_ids_to_tokens([token for token in ids if token not in special]):
        if byte := _BYTE.fullmatch(piece):
            runs[-1] += bytes([int(byte[1], 16)])
        else:
            runs += [piece.replace("▁", " ").encode(), b""]
    text = "".join(run.decode("utf-8", "each byte") for run in runs)
    return text.removeprefix(" ") if "Strip" in str(tokenizer._tokenizer.decoder) else text


@st.composite
def tokens(draw: st.DrawFn, tokenizer: Any, most: int) -> list[int]:
    """Any tokens; parts of characters from anywhere in them; special and added ones; the same again and again."""
    vocabulary = tokenizer.get_vocab()
    family = tokenizer.encode(FAMILY, add_special_tokens=False)
    if "<0x00>" in vocabulary:
        family = [vocabulary[f"<0x{byte:02X}>"] for byte in FAMILY.encode()]
    added = sorted({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder})
    part = st.tuples(st.integers(0, len(family) - 1), st.integers(1, 9)).map(lambda at: family[at[0] : sum(at)])
    one = st.integers(0, len(tokenizer) - 1).map(lambda token: [token])
    again = st.tuples(st.sampled_from([*added, *family]), st.sampled_from([1, 2, 12])).map(lambda at: [at[0]] * at[1])
    return [token for block in draw(st.lists(st.one_of(one, part, part, again), max_size=most)) for token in block]


def read(cursor: IncrementalDetokenizer, blocks: Sequence[Sequence[int]]) -> str:
    said = ""
    for block in blocks:
        cursor, text, _ = cursor.advance(block)
        said += text
    return said + cursor.flush()


def is_behind(text: str, before: str, whole: str) -> bool:
    """Whether `text` goes on from `before` to `whole`. What `before` left broken at its end may become whole."""
    if whole.startswith(before):
        return whole == before + text
    broken = whole[: len(whole) - len(text)]
    return whole.endswith(text) and broken.rstrip(HALF) == before.rstrip(HALF) and not text.startswith(HALF)


@pytest.mark.parametrize("name", MADE)
@EXAMPLES
@given(data=st.data())
def test_any_steps_give_the_text_that_the_ids_decode_to(name: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(name)
    prompt, ids = data.draw(tokens(tokenizer, 6)), data.draw(tokens(tokenizer, 12))
    skip = data.draw(st.booleans())
    cuts = sorted(data.draw(st.sets(st.integers(0, len(ids)))) | {0, len(ids)})
    blocks = [ids[start:end] for start, end in pairwise(cuts)]
    cursor = IncrementalDetokenizer.after(prompt, tokenizer, skip_special=skip)
    text = read(cursor, [[token] for token in ids])
    assert read(cursor, blocks) == text
    never = IncrementalDetokenizer.after(
        prompt, tokenizer, skip_special=skip, stop=("\x01\x02", "\ufffd\x03"), min_tokens=3
    )
    assert read(never, blocks) == text
    assert is_behind(text, decoded(tokenizer, prompt, skip), decoded(tokenizer, [*prompt, *ids], skip))


@pytest.mark.parametrize("name", MADE)
@EXAMPLES
@given(data=st.data())
def test_a_stop_string_cuts_the_text_at_its_first_end(name: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(name)
    prompt, ids = data.draw(tokens(tokenizer, 3)), data.draw(tokens(tokenizer, 8))
    text = read(IncrementalDetokenizer.after(prompt, tokenizer), [ids]).rstrip(HALF)
    if not text:
        return
    at = data.draw(st.integers(0, len(text) - 1))
    stop = text[at : at + data.draw(st.integers(1, 3))]
    cut = sorted({0, data.draw(st.integers(0, len(ids))), len(ids)})
    cursor, said = IncrementalDetokenizer.after(prompt, tokenizer, stop=(stop,)), ""
    for start, end in pairwise(cut):
        cursor, more, found = cursor.advance(ids[start:end])
        said += more
        if found is not None:
            break
    assert (said, found) == (text[: text.find(stop)], stop)


@pytest.mark.parametrize("name", MADE)
def test_a_token_costs_the_same_however_long_the_text_is(name: str) -> None:
    """Counted: ids decoded. Broken bytes, silent tokens and plain words, hundreds of each."""
    tokenizer = tokenizer_of(name)
    asked: list[int] = []

    class Counted:
        def decode(self, token_ids: list[int], **options: bool) -> str:
            asked.append(len(token_ids))
            return str(tokenizer.decode(token_ids, **options))

        def __getattr__(self, attribute: str) -> Any:
            return getattr(tokenizer, attribute)

    words = tokenizer.encode("the quick brown 日", add_special_tokens=False)
    for repeated in (words, words[-1:], words[-2:-1], [tokenizer.eos_token_id], [len(tokenizer) - 1]):
        cursor = IncrementalDetokenizer.after(words[:3], Counted())
        asked.clear()
        for token in repeated * (300 // len(repeated)):
            cursor, _, _ = cursor.advance([token])
        assert max(asked) < 40
        assert sum(asked) < 300 * 80


@pytest.mark.parametrize("name", MADE)
@EXAMPLES
@given(data=st.data())
def test_the_servers_places_of_tokens_are_places_in_the_text(name: str, data: st.DataObject) -> None:
    """`text_offset` of log-probabilities: where each token's first whole character stands."""
    tokenizer = tokenizer_of(name)
    prompt, ids = data.draw(tokens(tokenizer, 3)), data.draw(tokens(tokenizer, 8))

    class Asked:
        class params:
            skip_special_tokens = True
            stop = ()

    Asked.ids = prompt  # type: ignore[attr-defined]
    spelling = Spelling(Texts(tokenizer), Asked)  # type: ignore[arg-type]
    cursor, said, places = IncrementalDetokenizer.after(prompt, tokenizer), "", []
    for token in ids:
        places.append(len(said))
        cursor, text, _ = cursor.advance([token])
        said += text
    found = spelling.take([Logprob(token, 0.0) for token in ids], said, None)
    assert [place for place, _ in found] == places


@pytest.mark.parametrize("name", MADE)
def test_the_server_spells_a_token_as_the_text_does(name: str) -> None:
    tokenizer = tokenizer_of(name)
    texts = Texts(tokenizer)
    cursor = IncrementalDetokenizer.after(
        tokenizer.encode("a", add_special_tokens=False), tokenizer, skip_special=False
    )
    for token in range(len(tokenizer)):
        assert texts.text(token) == read(cursor, [[token]])
        if HALF not in texts.text(token):
            assert bytes(texts.bytes(token)).decode() == texts.text(token)


@pytest.mark.parametrize("name", MADE)
def test_special_tokens_may_stand_inside_a_character(name: str) -> None:
    """However many are skipped: they push nothing out of what decides how the next token is spelt."""
    tokenizer = tokenizer_of(name)
    vocabulary = tokenizer.get_vocab()
    letters = [vocabulary[f"<0x{byte:02X}>"] for byte in "é".encode()] if "<0x00>" in vocabulary else None
    letters = letters or tokenizer.encode("é", add_special_tokens=False)
    skipped = next(
        (token for token in tokenizer.all_special_ids if not tokenizer.decode([token], skip_special_tokens=True)), None
    )
    if skipped is None:
        pytest.skip("no special tokens")
    ids = [token for letter in letters for token in (letter, *[skipped] * 20)]
    cursor = IncrementalDetokenizer.after([], tokenizer)
    assert read(cursor, [[token] for token in ids]) == decoded(tokenizer, letters, True)
