"""Single tokens as text: as they are spelt within one."""

from __future__ import annotations

from specgen.server.texts import Texts
from tests.models.tokenizers import byte_level, sentence_piece

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
