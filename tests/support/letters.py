"""A tokenizer of one letter for each token, and other threads: to call on, to wait for, to count."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

SECONDS = 30


class Letters:
    """A tokenizer whose token t is the character behind the space by t, with a chat template."""

    eos_token_id = None
    chat_template = "{{ messages }}"

    def __call__(self, text: str) -> Mapping[str, list[int]]:
        return {"input_ids": self.encode(text)}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) - 32 for letter in text]

    def decode(self, token_ids: Sequence[int], **options: bool) -> str:
        return "".join(chr(32 + token) for token in token_ids)

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **options: bool) -> Mapping[str, list[int]]:
        return self("".join(f"<{message['role']}>{message['content']}" for message in messages) + "<bot>")


def until(condition: Callable[[], object]) -> None:
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def in_thread(function: Callable[[], Any]) -> Future[Any]:
    """What comes of a call on a thread that holds up nobody if it waits for ever."""
    answer: Future[Any] = Future()

    def run() -> None:
        try:
            answer.set_result(function())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer


def engine_threads() -> int:
    return sum(thread.name == "specgen-engine" for thread in threading.enumerate())
