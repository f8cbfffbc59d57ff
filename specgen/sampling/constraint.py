"""Constraints: what a request's text must look like. A plugin knows the grammars; here a sequence is held to one.

A matcher follows the tokens of one sequence. The walk asks it for one mask per row that it visits and for nothing
else, so a constrained sequence draws what plain decoding under the same masks would draw; drafts are pruned before
they become rows, which saves rows and changes no token.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from specgen._base.log import Log
from specgen._base.timed_threads import TimedThreads
from specgen.errors import InvalidRequest, Overloaded, UnknownName
from specgen.tree import path, select
from specgen.types import EMPTY_TREE, AnyTokenizer, Constraint, Json, TokenTree

log = Log("specgen.constraint")

_WELL_KNOWN = frozenset({"json_object", "json_schema", "regex", "choice", "grammar", "tool_calls"})
"""Kinds that OpenAI's and vLLM's fields ask for."""

_HINT = "the plugin specgen-grammar has it: pip install ./plugins/specgen-grammar in specgen's repository"
_SIMPLEST = "json_object"


class Matcher(ABC):
    """Where one sequence stands in a grammar. Built on a thread of its own, then the engine's alone.

    It speaks of tokens that carry text. When the sequence may end, it says by `may_end`; which tokens end it is the
    engine's business. What a method raises fails the request, and the others go on.
    """

    @abstractmethod
    def allowed(self) -> Tensor:
        """bool[vocab], on the CPU: the tokens that may come next. The caller may write into it."""

    @abstractmethod
    def may_end(self) -> bool:
        """Whether the text so far is whole."""

    @abstractmethod
    def is_complete(self) -> bool:
        """Whether the text so far is whole and nothing may follow it."""

    @abstractmethod
    def consume(self, token: int) -> None:
        """Go on by an allowed token."""

    @abstractmethod
    def permitted(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` may come next, in their order; changes nothing. Too many cost rows, never a token."""

    @abstractmethod
    def copy(self) -> Matcher:
        """One more that stands at the same place and goes its own way."""

    def forced(self) -> Sequence[int]:
        """Tokens that must come next, in their order, because the grammar leaves no other; changes nothing."""
        return ()


@dataclass(frozen=True, eq=False)
class ConstraintSetup:
    """What a constraint factory is told of an engine: one object per engine, hashed by identity, so that what is
    expensive to build of it can be kept with it.

    tokenizer: None where the engine has none. vocab_size: width of a row. end_ids: the model's own end tokens.
    """

    tokenizer: AnyTokenizer | None
    vocab_size: int
    end_ids: tuple[int, ...] = ()


ConstraintFactory: TypeAlias = Callable[[ConstraintSetup, Json], Matcher]
"""`factory(setup, value) -> Matcher`: `value` is what the request says, in JSON's types.

Called for each constrained request, possibly on several threads at once, while the thread that submits it waits for at
most `constraint_seconds`. Raise InvalidRequest for a value that cannot be compiled, and bound the memory that one may
take: what runs on after its time keeps a thread until it ends.
"""


class Constraints:
    """The kinds of constraints that an engine has, by name. seconds: how long one may be compiled."""

    def __init__(self, offered: Mapping[str, ConstraintFactory], setup: ConstraintSetup, seconds: float = 5.0) -> None:
        self._offered = offered
        self._setup = setup
        self._threads = TimedThreads("specgen-constraint", seconds)
        self._warming = threading.Lock()
        self._is_warm = _SIMPLEST not in offered

    def warm(self) -> None:
        """Have built what all constraints need of the tokenizer, once: it may hold up every thread for a second, and is
        not in the time of a request."""
        with self._warming:
            if not self._is_warm:
                # Whatever is wrong with the tokenizer, the request says.
                with suppress(Exception):
                    self._offered[_SIMPLEST](self._setup, None)
                self._is_warm = True

    def compile(self, constraint: Constraint) -> Matcher:
        """A matcher at the start.

        Raises UnknownName for a kind that nothing offers, Overloaded while others that take too long hold all threads,
        else InvalidRequest, naming the field that asked for it.
        """
        factory = self._offered.get(constraint.kind)
        if factory is None:
            hint = _HINT if constraint.kind in _WELL_KNOWN else None
            raise UnknownName("constraint", constraint.kind, self._offered, param=constraint.param, hint=hint)
        self.warm()
        try:
            return self._threads.run(partial(factory, self._setup, constraint.value))
        except InvalidRequest as error:
            error.param = constraint.param
            raise
        except Overloaded:
            raise
        except TimeoutError:
            message = f"constraint {constraint.kind!r} is not compiled after {self._threads.seconds:g} seconds"
            raise InvalidRequest(f"{message}, the limit; ask for a simpler one", param=constraint.param) from None
        except Exception as error:  # a plugin's code, given what a user wrote
            message = f"constraint {constraint.kind!r} refuses its value: {error}"
            raise InvalidRequest(message, param=constraint.param) from error


class Constrained:
    """One sequence under its constraint. Owned by the sequence; the walk calls `mask` and `advance` in turn.

    end_ids: tokens that end the sequence: allowed where the text may end, besides what the grammar allows.
    """

    def __init__(self, matcher: Matcher, end_ids: Collection[int]) -> None:
        self._matcher = matcher
        self._end_ids = torch.tensor(sorted(end_ids), dtype=torch.int64)
        self._error: Exception | None = None

    def mask(self, ids: Tensor, logits: Tensor) -> Tensor:
        """float32[1, vocab] with -inf for what may not come next: a logits processor."""
        if self._error is not None:
            raise self._error
        allowed = self._matcher.allowed()
        if self._matcher.may_end():
            allowed[self._end_ids] = True
        return logits.masked_fill(~allowed.to(logits.device), -math.inf)

    def advance(self, token: int) -> bool:
        """Take in a token that was drawn and is no end; whether the sequence ends with it, for nothing may follow."""
        self._matcher.consume(token)
        return self._matcher.is_complete()

    def prune(self, tree: TokenTree) -> TokenTree:
        """The tree without the nodes that may not come next."""
        try:
            kept = self._permitted(tree)
        except Exception as error:  # a plugin's code: the sequence ends with it in its walk, the others go on
            log.warning("a constraint cannot judge drafts", error=repr(error))
            self._error = error
            return EMPTY_TREE
        return tree if len(kept) == len(tree) else select(tree, kept)

    def forced(self) -> Sequence[int]:
        """Tokens that must come next, for the grammar allows no other."""
        return self._matcher.forced()

    def _permitted(self, tree: TokenTree) -> set[int]:
        kept: set[int] = set()
        for leaf in sorted(set(range(len(tree))) - set(tree.parents)):
            nodes = path(tree, leaf)
            kept.update(nodes[: self._matcher.permitted([tree.tokens[node] for node in nodes])])
        return kept
