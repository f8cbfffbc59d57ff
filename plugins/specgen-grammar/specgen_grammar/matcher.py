"""llguidance's matcher behind specgen's protocol, and compilation within limits."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import takewhile
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from specgen import ConstraintSetup, InvalidRequest, Matcher, RequestFailed

MAX_CHARACTERS = 65_536
"""Of a grammar: what is longer may take seconds to compile."""

# What a grammar may cost while it is compiled, per step, and in memory. Beyond it the request fails, nothing else.
_LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)

_LONGEST_REASON = 500
"""llguidance quotes the whole grammar."""

# llguidance's limits bound what a step may build, not the time that this takes: grammars that may be dear are followed
# on other threads, which costs each step a tenth of a millisecond.
STEP_SECONDS = 0.5
_SHORT_CHARACTERS = 2048
_QUICK_SECONDS = 0.05
_threads = ThreadPoolExecutor(4, thread_name_prefix="specgen-grammar")

T = TypeVar("T")

_tokenizers: WeakKeyDictionary[ConstraintSetup, LLTokenizer] = WeakKeyDictionary()
_building = threading.Lock()


def compile_grammar(kind: str, grammar: str, setup: ConstraintSetup) -> Matcher:
    """A matcher at the start of `grammar`, its first mask computed.

    Raises InvalidRequest for a grammar that is too long, that llguidance refuses, or that no text but the empty one
    satisfies.
    """
    if len(grammar) > MAX_CHARACTERS:
        message = f"{kind} makes a grammar of {len(grammar)} characters; at most {MAX_CHARACTERS} are compiled"
        raise InvalidRequest(message)
    tokenizer, began = _tokenizer(setup), time.thread_time()
    compiled = LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
    if compiled.is_error():
        raise InvalidRequest(f"{kind} cannot be compiled: {_reason(compiled)}")
    matcher = _Following(compiled, setup)
    try:
        possible = bool(matcher.allowed().any())
    except RequestFailed as error:
        raise InvalidRequest(f"{kind} cannot be compiled: {error}") from None
    if not possible:
        raise InvalidRequest(f"{kind} allows no text but the empty one")
    is_dear = len(grammar) > _SHORT_CHARACTERS or time.thread_time() - began > _QUICK_SECONDS
    return _Following(compiled, setup, _in_time) if is_dear else matcher


def _at_once(function: Callable[[], T]) -> T:
    return function()


def _in_time(function: Callable[[], T]) -> T:
    """What `function` answers on another thread. Raises RequestFailed where that takes too long: it may run on, but
    nobody waits for it any more."""
    asked = _threads.submit(function)
    try:
        return asked.result(STEP_SECONDS)
    except TimeoutError:
        asked.cancel()
        raise RequestFailed(
            f"the grammar cannot be followed: a step takes more than {STEP_SECONDS:g} seconds"
        ) from None


class _Following(Matcher):
    """Where one sequence stands in a compiled grammar. run: how what may take long is called."""

    def __init__(
        self, matcher: LLMatcher, setup: ConstraintSetup, run: Callable[[Callable[[], Any]], Any] = _at_once
    ) -> None:
        self._matcher = matcher
        self._setup = setup
        self._run = run

    def allowed(self) -> Tensor:
        bits = np.frombuffer(self._run(self._matcher.compute_bitmask), np.uint8)
        self._check()
        words = np.unpackbits(bits, count=self._setup.vocab_size, bitorder="little")
        words[_end_ids(self._setup)] = 0
        return torch.from_numpy(words).to(torch.bool)

    def may_end(self) -> bool:
        return self._matcher.is_accepting()

    def is_complete(self) -> bool:
        if not self._matcher.is_stopped():
            return False
        if not self.may_end():
            raise RequestFailed(f"the grammar cannot be followed: {self._matcher.stop_reason()}")
        return True

    def consume(self, token: int) -> None:
        self._run(partial(self._matcher.consume_token, token))
        self._check()

    def permitted(self, tokens: Sequence[int]) -> int:
        ends = _end_ids(self._setup)
        text = list(takewhile(lambda token: token not in ends, tokens))
        count: int = self._run(partial(self._matcher.validate_tokens, text))
        self._check()
        return count

    def copy(self) -> Matcher:
        return _Following(self._matcher.deep_copy(), self._setup, self._run)

    def forced(self) -> Sequence[int]:
        found: Sequence[int] = self._run(self._matcher.compute_ff_tokens)
        return found

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestFailed(f"the grammar cannot be followed: {_reason(self._matcher)}")


def _reason(matcher: LLMatcher) -> str:
    reason = matcher.get_error().removesuffix("<non-verbose/>").strip()
    return reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]}..."


def _tokenizer(setup: ConstraintSetup) -> LLTokenizer:
    """The engine's tokenizer as llguidance knows it; built once, which takes about a second."""
    with _building:
        if setup not in _tokenizers:
            _tokenizers[setup] = _built(setup.tokenizer, setup)
        return _tokenizers[setup]


def _built(tokenizer: Any, setup: ConstraintSetup) -> LLTokenizer:
    try:
        known = _without_added(tokenizer, setup.vocab_size)
        return llguidance.hf.from_tokenizer(known, n_vocab=setup.vocab_size, eos_token=_end_ids(setup))
    except ValueError as error:
        name = type(tokenizer).__name__
        message = f"this engine's tokenizer ({name}) takes no constraints: {error}"
        raise InvalidRequest(message) from None


def _without_added(tokenizer: Any, vocab_size: int) -> Any:
    """The tokenizer without tokens that were added behind the model's vocabulary: it has no logits for them. What they
    say it may say in others, so they cannot just be cut from the masks, where one of them may be all that is left."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or len(tokenizer) <= vocab_size:
        return tokenizer
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["id"] < vocab_size]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)))


def _end_ids(setup: ConstraintSetup) -> list[int]:
    """Tokens that are no text. llguidance needs one: where the model has none, it is some special token."""
    special = getattr(setup.tokenizer, "all_special_ids", ())
    return list(setup.end_ids or special[:1] or (0,))
