"""What a drafter is. Implement `Drafter` and `DraftSession`; everything else in this folder is one such pair."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from transformers import PreTrainedModel

from specgen.draft.features import Features, Wanted
from specgen.lora.adapter import Adapter
from specgen.types import AnyTokenizer, TokenTree

if TYPE_CHECKING:
    from specgen.model.forward.compiled import Example, Rows
    from specgen.model.runner import ModelRunner


class LoadedModel(NamedTuple):
    """A model behind a packed forward that the drafter owns, and its tokenizer, `None` where there is none."""

    model: ModelRunner
    tokenizer: AnyTokenizer | None


@dataclass(frozen=True, slots=True)
class DraftHints:
    """What a session may know besides the ids. `prediction` is the text the caller expects, as token ids; what is kept
    beyond the session may be shown only to sessions of the same `cache_salt`, which names an adapter too. `adapter` is
    what the sequence runs under, with `draft_weights` while it does. `forced()` answers, while a session proposes, the
    tokens that the request's constraint leaves no choice but; none where there is no constraint."""

    prediction: tuple[int, ...] = ()
    cache_salt: str = ""
    adapter: Adapter | None = None
    forced: Callable[[], Sequence[int]] = tuple


class DraftSession(ABC):
    """One sequence's drafting state. Touched from the engine's thread alone, between `open` and `close`."""

    @abstractmethod
    def propose(self, max_nodes: int) -> TokenTree:
        """Guess what follows the ids committed so far: a tree of at most `max_nodes` nodes, possibly empty.

        Must depend on nothing but what the session was given: never on the clock or on the target's random draws.
        May be called again without a commit in between, and must then answer the same. How deep the tree is may follow
        from `Drafter.token_seconds`.
        """

    @abstractmethod
    def commit(self, tokens: Sequence[int]) -> None:
        """Take note of tokens that were committed, in order. Called with every committed token exactly once."""

    def observe(self, features: Features) -> None:
        """See what the target's forward said on this sequence, as far as `Drafter.wanted` asks for it.

        Called before the `commit` of the tokens that the forward led to, and for each chunk of the prompt. Row by row,
        the hidden states at a position are those that the token one position later was drawn from.
        """

    def close(self) -> None:
        """Give back what the session holds. Called exactly once, whatever happened."""


class Drafter(ABC):
    """A source of trees, shared by all sequences of an engine.

    What is raised by a session or a drafter switches that drafter off for the requests concerned; the requests go on.
    wanted: what its sessions are shown of each forward of the target; fixed once the drafter is built.
    token_seconds: what one token more in a step is worth, told before each proposal; 0 where time does not count. A
        drafter that works in levels may stop where the next costs more than it can bring (`Levels`).
    """

    wanted: Wanted = Wanted()
    token_seconds: float = 0.0

    @abstractmethod
    def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
        """A session for one sequence whose prompt is `prompt`."""

    def propose(self, sessions: Sequence[DraftSession], max_nodes: Sequence[int]) -> list[TokenTree]:
        """One tree per session, of at most `max_nodes[i]` nodes.

        Override it to draft for the whole batch at once; the default asks one session after the other.
        """
        return [session.propose(most) for session, most in zip(sessions, max_nodes, strict=True)]

    def check(self) -> None:
        """Raise RuntimeError if anything is held that no open session owns. Tests call it after every run."""


@dataclass(frozen=True, slots=True)
class DrafterSetup:
    """What a drafter factory is given when an engine is built.

    options: what the user wrote for this drafter. A factory refuses unknown ones by name.
    load_model: loads a model from a path, or takes one, with as many tokens of KV as the target's pool.
    target: the target's model, to read its config and weights; not to be run or changed.
    compile_rows: compiles a function of packed rows where the engine compiles the target's forward, and else gives it
        back; see `specgen.model.forward.compiled.compile_rows`.
    """

    vocab_size: int
    tokenizer: AnyTokenizer | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    load_model: Callable[[str | Path | PreTrainedModel], LoadedModel] | None = None
    target: PreTrainedModel | None = None
    compile_rows: Callable[[Rows, Sequence[Example]], Rows] = lambda function, examples: function


DrafterFactory: TypeAlias = Callable[[DrafterSetup], Drafter]
