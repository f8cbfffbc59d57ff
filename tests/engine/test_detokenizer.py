"""Text as it comes: whole characters, nothing behind a stop string, and the same text however the tokens are split."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from transformers import PreTrainedTokenizerBase

from specgen.engine.detokenizer import Decoder, IncrementalDetokenizer
from tests.support.tokenizers import sentence_piece

EMOJI = "\N{GRINNING FACE}"
HALF = "\N{REPLACEMENT CHARACTER}"
SPEECHES = (
    "The quick brown fox jumps over the lazy dog. It's 12:30, isn't it?",
    "Größe, façade, naïve, Ærøskøbing, smörgåsbord; «guillemets» – and dashes…",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "いろはにほへと ちりぬるを、我が世たれぞ常ならむ。",
    "天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。",
    "השועל החום המהיר קופץ مرحبا بالعالم كيف الحال",
    "नमस्ते दुनिया ฉันรักภาษาไทย 안녕하세요 세계",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 🇩🇪🇯🇵 and e\u0301 composed; 😀😃😄",
    "def f(x):\n\treturn {'a': [1, 2,  3]}\n\n\n# \u00a0\u200b done\r\n",
)


class Bytes:
    """A tokenizer whose tokens are byte strings; broken characters decode as they do in byte-level BPE."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def decode(self, token_ids: Sequence[int], **options: bool) -> str:
        return b"".join(self.pieces[token] for token in token_ids).decode("utf-8", "replace")


def letters(text: str) -> Bytes:
    """Token i is the i-th byte of the text."""
    return Bytes(*(bytes([byte]) for byte in text.encode()))


def read(cursor: IncrementalDetokenizer, blocks: Sequence[Sequence[int]]) -> tuple[str, str | None, int]:
    """What is shown over all blocks, the end flushed; the stop string, and the block it was complete in."""
    shown = ""
    for number, block in enumerate(blocks):
        cursor, text, stop = cursor.advance(block)
        shown += text
        if stop is not None:
            return shown, stop, number
    return shown + cursor.flush(), None, len(blocks)


def cut(ids: Sequence[int], rng: random.Random) -> list[list[int]]:
    """The ids in blocks of random lengths, as steps with drafts would commit them."""
    blocks, start = [], 0
    while start < len(ids):
        length = rng.choice((1, 1, 2, 3, 7, 20))
        blocks.append(list(ids[start : start + length]))
        start += length
    return blocks


# Characters.


def test_half_a_character_is_never_shown() -> None:
    """An emoji of four one-byte tokens appears with the last of them."""
    cursor = IncrementalDetokenizer.after([], letters(f"a{EMOJI}b"))
    shown = []
    for token in range(6):
        cursor, text, _ = cursor.advance([token])
        shown.append(text)
    assert shown == ["a", "", "", "", EMOJI, "b"]


def test_what_stands_before_half_a_character_is_shown() -> None:
    """One token may hold a word's end and a character's beginning."""
    decoder = Bytes(b"so \xf0\x9f", b"\x98", b"\x80!")
    cursor, first, _ = IncrementalDetokenizer.after([], decoder).advance([0])
    cursor, second, _ = cursor.advance([1])
    _, third, _ = cursor.advance([2])
    assert (first, second, third) == ("so ", "", f"{EMOJI}!")


def test_a_character_that_never_ends_comes_with_the_flush() -> None:
    cursor, text, _ = IncrementalDetokenizer.after([], Bytes(b"a", b"\xf0\x9f")).advance([0, 1])
    assert (text, cursor.flush()) == ("a", HALF)


def test_a_broken_character_is_shown_when_the_next_begins() -> None:
    cursor, first, _ = IncrementalDetokenizer.after([], Bytes(b"\xf0\x9f", b"a")).advance([0])
    _, second, _ = cursor.advance([1])
    assert (first, second) == ("", f"{HALF}a")


def test_a_replacement_character_that_the_model_means_is_not_lost() -> None:
    decoder = Bytes(HALF.encode(), b"a")
    assert read(IncrementalDetokenizer.after([], decoder), [[0], [0], [1], [0]])[0] == f"{HALF}{HALF}a{HALF}"


def test_a_long_run_of_broken_bytes_comes_out_in_the_end() -> None:
    decoder = Bytes(b"\x80", b"a")
    assert read(IncrementalDetokenizer.after([], decoder), [[0]] * 40 + [[1]])[0] == HALF * 40 + "a"


def test_the_prompt_is_not_shown_but_decides_how_the_text_begins() -> None:
    """As sentence-piece tokenizers have it: the space before a word shows only behind another word."""

    class Words:
        def decode(self, token_ids: Sequence[int], **options: bool) -> str:
            return " ".join(f"w{token}" for token in token_ids)

    assert read(IncrementalDetokenizer.after([], Words()), [[1], [2]])[0] == "w1 w2"
    assert read(IncrementalDetokenizer.after([7], Words()), [[1], [2]])[0] == " w1 w2"
    assert read(IncrementalDetokenizer.after(range(50), Words()), [[1, 2]])[0] == " w1 w2"


def test_a_prompt_that_ends_inside_a_character_is_completed() -> None:
    decoder = Bytes(b"\xf0\x9f", b"\x98\x80", b"!")
    assert read(IncrementalDetokenizer.after([0], decoder), [[1], [2]])[0].endswith("!")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_broken_byte_takes_nothing_back_that_was_shown(size: int) -> None:
    """A newline in a byte before half an emoji that the length cuts: the decoder alone makes one broken run of it."""
    tokenizer = sentence_piece(64, "x ab")
    first = tokenizer.convert_tokens_to_ids("<0x00>")
    ids = [first + byte for byte in f"\n\u00e9{EMOJI}".encode()[:5]]
    assert tokenizer.decode(ids) == HALF * 5
    blocks = [ids[start : start + size] for start in range(0, 5, size)]
    cursor = IncrementalDetokenizer.after(tokenizer.encode("x ab"), tokenizer)
    assert read(cursor, blocks)[0] == f"\n\u00e9{HALF * 2}"
    ids += [first + ord("!"), *tokenizer.encode("x", add_special_tokens=False)]
    assert read(cursor, [ids])[0] == f"\n\u00e9{HALF * 2}! x"


@pytest.mark.parametrize("pieces", [(b"a\xf0\x9f", b"\x98", b"\x80!"), (b"a", b"\xf0\x9f", b"\x98", b"\x80!")])
def test_what_the_prompt_left_broken_shows_only_as_a_whole_character(pieces: tuple[bytes, ...]) -> None:
    decoder = Bytes(*pieces, b"b", HALF.encode())
    prompt, after = range(len(pieces) - 2), [[len(pieces) - 2], [len(pieces) - 1]]
    assert read(IncrementalDetokenizer.after(prompt, decoder), after)[0] == f"{EMOJI}!"
    assert read(IncrementalDetokenizer.after(prompt, decoder), [[len(pieces)]])[0] == "b"
    assert read(IncrementalDetokenizer.after(prompt, decoder), [after[0]])[0] == ""
    quoted = len(pieces) + 1
    assert (
        read(IncrementalDetokenizer.after([0, quoted], Bytes(b"a", *decoder.pieces[1:])), [[quoted], [quoted - 1]])[0]
        == f"{HALF}b"
    )


def test_special_tokens_that_are_left_out_are_no_beginning_of_a_text() -> None:
    """A decoder that drops a text's first space would drop one in its middle."""
    tokenizer = sentence_piece(64, "x ab")
    end, word = tokenizer.eos_token_id, tokenizer.encode("x", add_special_tokens=False)
    ids = [*word, *[end] * 40, *word]
    assert read(IncrementalDetokenizer.after([], tokenizer), [[token] for token in ids])[0] == tokenizer.decode(
        ids, skip_special_tokens=True
    )
    assert read(IncrementalDetokenizer.after(ids[:-1], tokenizer), [word])[0] == " x"


def test_without_a_tokenizer_there_is_no_text() -> None:
    cursor, text, stop = IncrementalDetokenizer.after([1, 2], None).advance([3])
    assert (text, stop, cursor.flush()) == ("", None, "")


def test_advancing_leaves_the_cursor_as_it_was() -> None:
    """A walk may be thrown away and walked again."""
    before = IncrementalDetokenizer.after([], letters("abcd"), stop=("bcx",))
    first = before.advance([0, 1, 2])
    assert before.advance([0, 1, 2]) == first
    assert before == IncrementalDetokenizer.after([], before.decoder, stop=("bcx",))


class Counted:
    """A tokenizer, and how many ids it was asked for at once."""

    def __init__(self, inner: Decoder) -> None:
        self.inner = inner
        self.most = 0

    def decode(self, token_ids: list[int], **options: bool) -> str:
        self.most = max(self.most, len(token_ids))
        return self.inner.decode(token_ids, **options)


@pytest.mark.parametrize("piece", [HALF.encode(), b"\x80", b"\xf0\x9f", "\u044f".encode()[1:] + "\u044f".encode()[:1]])
def test_text_that_stays_broken_is_shown_and_costs_no_more_with_time(piece: bytes) -> None:
    """Characters that a model quotes as broken, bytes that are no text, tokens that each end in half a character."""
    decoder = Counted(Bytes(piece, b"a", EMOJI.encode()[:2], EMOJI.encode()[2:]))
    ids = [0] * 400
    cursor = IncrementalDetokenizer.after([], decoder)
    shown = 0
    for count, token in enumerate(ids, start=1):
        cursor, text, _ = cursor.advance([token])
        shown += len(text)
        if count > 30:
            assert shown >= len(decoder.inner.decode(ids[:count])) - 4
    assert decoder.most < 40
    rng = random.Random(len(piece))
    for _ in range(20):
        ids = [0] * rng.randint(0, 60) + [rng.choice((0, 1, 2, 3)) for _ in range(20)] + [0] * 40 + [1, 2, 3, 1]
        blocks = cut(ids, rng)
        assert read(IncrementalDetokenizer.after([], decoder.inner), blocks)[0] == decoder.inner.decode(ids)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 61, 62, 63])
def test_a_long_run_of_bytes_is_no_broken_text(size: int) -> None:
    """A decoder that takes a run of bytes that ends with half a character for broken from its beginning."""
    text = "x " + EMOJI * 30
    tokenizer = sentence_piece(64, "x ab")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > 4 * 30
    blocks = [ids[start : start + size] for start in range(0, len(ids), size)]
    assert read(IncrementalDetokenizer.after([], tokenizer), blocks)[0] == tokenizer.decode(ids)


# Stop strings.


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_stop_strings_are_not_looked_for_before_min_tokens(size: int) -> None:
    """As in vLLM: one may begin in the text of those tokens, not end there. What it cannot end comes at once."""
    decoder = letters("abcabcabc")
    blocks = [list(range(9))[start : start + size] for start in range(0, 9, size)]
    said = {
        n: read(IncrementalDetokenizer.after([], decoder, stop=("abc", "b"), min_tokens=n), blocks)[:2]
        for n in range(9)
    }
    assert said[0] == said[1] == ("a", "b")
    # The fourth is an a: the next b ends the text, the string of three does not come to its end.
    assert said[2] == ("", "abc")
    assert said[3] == said[4] == ("abca", "b")
    assert said[5] == ("abc", "abc")
    assert said[8] == ("abcabc", "abc")
    assert read(IncrementalDetokenizer.after([], decoder, stop=("abc",), min_tokens=9), blocks)[:2] == (
        "abcabcabc",
        None,
    )
    shown = IncrementalDetokenizer.after([], letters("abcx"), stop=("abcy", "bc"), min_tokens=3)
    assert read(shown, [[0], [1], [2], [3]])[:2] == ("abcx", None)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 11])
def test_a_stop_string_over_token_borders_ends_the_text(size: int, include: bool) -> None:
    ids = list(range(11))
    blocks = [ids[start : start + size] for start in range(0, 11, size)]
    cursor = IncrementalDetokenizer.after([], letters("hello world"), stop=("lo wo",), include_stop=include)
    shown, stop, block = read(cursor, blocks)
    assert (shown, stop) == ("hello wo" if include else "hel", "lo wo")
    assert block == 7 // size, "the text ends with the token that completes it"


def test_what_may_become_a_stop_string_is_held_and_comes_when_it_does_not() -> None:
    cursor = IncrementalDetokenizer.after([], letters("xENE"), stop=("END",))
    shown = []
    for token in range(4):
        cursor, text, _ = cursor.advance([token])
        shown.append(text)
    assert shown == ["x", "", "", "EN"]
    assert cursor.flush() == "E"


def test_the_string_that_is_complete_first_wins() -> None:
    """Not the longer one, nor the one that begins first."""
    decoder = letters("abcdef")
    assert read(IncrementalDetokenizer.after([], decoder, stop=("bcde", "cd")), [range(6)]) == ("ab", "cd", 0)
    assert read(IncrementalDetokenizer.after([], decoder, stop=("abcdef", "d")), [range(6)]) == ("abc", "d", 0)
    assert read(IncrementalDetokenizer.after([], decoder, stop=("cd", "bcd")), [range(6)]) == ("a", "bcd", 0)


def test_the_first_of_two_occurrences_counts() -> None:
    assert read(IncrementalDetokenizer.after([], letters("a.b.c"), stop=(".",)), [range(5)]) == ("a", ".", 0)


def test_a_stop_string_may_overlap_itself() -> None:
    assert read(IncrementalDetokenizer.after([], letters("ababac"), stop=("abac",)), [[i] for i in range(6)])[:2] == (
        "ab",
        "abac",
    )


def test_a_stop_string_that_stands_in_the_prompt_does_not_stop() -> None:
    decoder = letters("stop!go")
    assert read(IncrementalDetokenizer.after(range(5), decoder, stop=("stop", "p!g")), [[5], [6]]) == ("go", None, 2)


def test_a_stop_string_is_seen_before_half_a_character() -> None:
    """The token that completes it ends the text, even if it also begins an emoji."""
    decoder = Bytes(b"so", b" \xf0\x9f", b"\x98\x80")
    cursor = IncrementalDetokenizer.after([], decoder, stop=("so ",))
    assert read(cursor, [[0], [1], [2]]) == ("", "so ", 1)
    cursor = IncrementalDetokenizer.after([], decoder, stop=("o ",))
    assert read(cursor, [[0], [1]]) == ("s", "o ", 1)


def test_an_emoji_can_be_a_stop_string() -> None:
    cursor = IncrementalDetokenizer.after([], letters(f"a{EMOJI}b"), stop=(EMOJI,))
    assert read(cursor, [[token] for token in range(6)]) == ("a", EMOJI, 4)


def test_what_is_flushed_is_what_was_held_and_half_a_character() -> None:
    cursor = IncrementalDetokenizer.after([], Bytes(b"xEN", b"\xf0\x9f"), stop=("END",))
    cursor, shown, _ = cursor.advance([0, 1])
    assert shown + cursor.flush() == f"xEN{HALF}"


@pytest.mark.parametrize("seed", range(60))
def test_any_split_gives_the_same_text_and_stops_at_the_same_place(seed: int) -> None:
    """Random tokens of random bytes, broken characters among them, and random stop strings of few letters."""
    rng = random.Random(seed)
    alphabet = [
        b"a",
        b"b",
        b"ab",
        b"ba",
        b"aab",
        b" ",
        *EMOJI.encode().split(b"\x98"),
        b"\x98",
        EMOJI.encode(),
        b"\xc3",
    ]
    decoder = Bytes(*alphabet)
    ids = [rng.randrange(len(alphabet)) for _ in range(60)]
    stop = tuple({"".join(rng.choices("ab ", k=rng.randint(2, 5))) for _ in range(rng.randint(0, 3))} | {f"b{EMOJI}"})
    cursor = IncrementalDetokenizer.after([], decoder, stop=stop, include_stop=rng.random() < 0.5)
    text, found, at = read(cursor, [[token] for token in ids])
    for _ in range(10):
        blocks = cut(ids, rng)
        shown, again, block = read(cursor, blocks)
        assert (shown, again) == (text, found)
        if found is not None:
            assert sum(map(len, blocks[:block])) <= at < sum(map(len, blocks[: block + 1]))
    whole = decoder.decode(ids)
    ends = [whole.find(string) + len(string) for string in stop if string in whole]
    if not ends:
        assert (text, found) == (whole, None)
    elif cursor.include_stop:
        assert text == whole[: min(ends)]
    else:
        assert text + str(found) == whole[: min(ends)]


# A real byte-level tokenizer.


def test_a_real_tokenizer_comes_out_as_it_decodes(smollm_tokenizer: PreTrainedTokenizerBase) -> None:
    """Nine scripts, token by token and in blocks."""
    rng = random.Random(4)
    for speech in SPEECHES:
        ids = smollm_tokenizer.encode(speech, add_special_tokens=False)
        assert smollm_tokenizer.decode(ids) == speech
        for blocks in ([[token] for token in ids], [ids], cut(ids, rng), cut(ids, rng)):
            shown = []
            cursor = IncrementalDetokenizer.after([], smollm_tokenizer)
            for block in blocks:
                cursor, text, _ = cursor.advance(block)
                shown.append(text)
            assert "".join(shown) == speech
            assert all(HALF not in text for text in shown), "half a character was shown"
            assert cursor.flush() == ""


@pytest.mark.parametrize("seed", range(25))
def test_random_tokens_of_a_real_tokenizer_come_out_as_they_decode(
    smollm_tokenizer: PreTrainedTokenizerBase, seed: int
) -> None:
    """Any of its tokens behind one another: broken characters, special tokens, pieces of words."""
    rng = random.Random(seed)
    odd = [token for text in SPEECHES[2:8] for token in smollm_tokenizer.encode(text, add_special_tokens=False)]
    ids = [rng.choice((rng.randrange(len(smollm_tokenizer)), rng.choice(odd))) for _ in range(80)]
    expected = smollm_tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for blocks in ([[token] for token in ids], cut(ids, rng)):
        assert read(IncrementalDetokenizer.after([], smollm_tokenizer), blocks) == (expected, None, len(blocks))


@pytest.mark.parametrize("seed", range(25))
def test_any_piece_of_a_real_text_can_be_its_stop_string(smollm_tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """The text ends before the first occurrence, and with the token that completes it."""
    rng = random.Random(seed)
    speech = rng.choice(SPEECHES)
    ids = smollm_tokenizer.encode(speech, add_special_tokens=False)
    start = rng.randrange(len(speech))
    stop = speech[start : start + rng.randint(1, 6)]
    at = speech.find(stop)
    whole = next(
        n for n in range(1, len(ids) + 1) if smollm_tokenizer.decode(ids[:n]).startswith(speech[: at + len(stop)])
    )
    cursor = IncrementalDetokenizer.after([], smollm_tokenizer, stop=(stop, "never said"))
    assert read(cursor, [[token] for token in ids]) == (speech[:at], stop, whole - 1)
    assert read(cursor, cut(ids, rng))[:2] == (speech[:at], stop)


def test_special_tokens_show_only_when_asked_for(smollm_tokenizer: PreTrainedTokenizerBase) -> None:
    ids = smollm_tokenizer.encode("one<|im_end|>two", add_special_tokens=False)
    assert read(IncrementalDetokenizer.after([], smollm_tokenizer), [ids])[0] == "onetwo"
    assert (
        read(IncrementalDetokenizer.after([], smollm_tokenizer, skip_special=False), [[t] for t in ids])[0]
        == "one<|im_end|>two"
    )


def test_the_text_continues_the_prompt(smollm_tokenizer: PreTrainedTokenizerBase) -> None:
    """Prompt and text together are what the ids of both decode to."""
    for speech in SPEECHES:
        ids = smollm_tokenizer.encode(speech, add_special_tokens=False)
        for border in (1, len(ids) // 3, len(ids) // 2):
            before = smollm_tokenizer.decode(ids[:border])
            if before.endswith(HALF):
                continue
            shown, _, _ = read(
                IncrementalDetokenizer.after(ids[:border], smollm_tokenizer), [[t] for t in ids[border:]]
            )
            assert before + shown == speech


@pytest.mark.parametrize("text", SPEECHES)
def test_pieces_in_single_bytes_come_out_as_they_decode(text: str) -> None:
    """A decoder that falls back on bytes takes a whole run of them for broken if it begins inside a character."""
    tokenizer = sentence_piece(60, "the quick brown fox jumps over the lazy dog")
    first = tokenizer.convert_tokens_to_ids("<0x00>")
    ids = [first + byte for byte in text.encode()]
    start = len(text[:9].encode())
    for width in (1, 2, 3, 5, 11, len(ids)):
        cursor, shown = IncrementalDetokenizer.after(ids[:start], tokenizer), ""
        for at in range(start, len(ids), width):
            cursor, more, _ = cursor.advance(ids[at : at + width])
            shown += more
        assert shown + cursor.flush() == text[9:]
