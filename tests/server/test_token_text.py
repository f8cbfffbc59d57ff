"""Single tokens as text: as they are spelt within one."""

from __future__ import annotations

from specgen.engine.request import Request
from specgen.sampling.params import SamplingParams
from specgen.server.token_text import Texts
from specgen.types import Result, Speculation, SpeculativeStats, StepOutput, Usage
from tests.support.tokenizers import byte_level, sentence_piece

SPEECH = "Hello world! The quick brown fox jumps over the lazy dog, again and again: it's a dog's life. 日 "


def test_tokens_keep_the_space_before_them() -> None:
    """Decoders that leave out the first space of a text would leave out that of each."""
    for tokenizer in (sentence_piece(60, SPEECH), byte_level(300, SPEECH)):
        texts = Texts(tokenizer)
        ids = tokenizer.encode("a quick dog! The fox", add_special_tokens=False)
        whole = tokenizer.decode(ids)
        said = [texts.text(token) for token in ids]
        assert whole == "a quick dog! The fox"
        # The very first one is at the beginning of a text here.
        assert "".join(said).removeprefix(" ") == whole
        assert bytes(byte for token in ids for byte in texts.bytes(token)).decode().removeprefix(" ") == whole


def test_parts_of_characters_are_their_bytes() -> None:
    for tokenizer in (sentence_piece(60, SPEECH), byte_level(256, "abc")):
        texts = Texts(tokenizer)
        ids = tokenizer.encode("a日", add_special_tokens=False)[-3:]
        assert [texts.bytes(token) for token in ids] == [[byte] for byte in "日".encode()]
        assert [texts.name(token) for token in ids] == [f"bytes:\\x{byte:02x}" for byte in "日".encode()]


def test_a_space_in_bytes_and_special_tokens_are_themselves() -> None:
    tokenizer = sentence_piece(60, SPEECH)
    texts = Texts(tokenizer)
    assert texts.text(tokenizer.convert_tokens_to_ids("<0x20>")) == " "
    assert texts.bytes(tokenizer.convert_tokens_to_ids("<0x20>")) == [0x20]
    assert texts.text(tokenizer.eos_token_id) == "</s>"


def test_traced_pieces_join_to_the_text() -> None:
    """Half a character at the end comes with the last token; an end token adds nothing."""
    tokenizer = sentence_piece(60, SPEECH)
    prompt = tuple(tokenizer.encode("a quick"))
    half = tokenizer.encode("日", add_special_tokens=False)[-3:][:2]
    for ids, stop in ((half, None), ([*half, tokenizer.eos_token_id], tokenizer.eos_token_id)):
        request = Request("r", prompt, SamplingParams(), 0, Speculation())
        finish = "length" if stop is None else "stop"
        usage = Usage(len(prompt), len(ids))
        result = Result("r", 0, "\ufffd\ufffd", tuple(ids), finish, stop, usage, SpeculativeStats(), 0)  # type: ignore[arg-type]
        tracer = Texts(tokenizer).tracer(request)
        first = tracer.trace(StepOutput("r", 0, tuple(ids[:1]), ""))
        last = tracer.trace(StepOutput("r", 0, tuple(ids[1:]), "\ufffd\ufffd", result=result))
        assert "".join(token.text for token in (*first.tokens, *last.tokens)) == result.text
        assert len(first.tokens) + len(last.tokens) == len(ids)
