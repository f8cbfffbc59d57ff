"""What every drafter, context stage and matcher must keep to, as classes of tests. Subclass them in a plugin's tests:

class TestMine(DrafterContract):
    def drafter(self) -> Drafter:
        return MyDrafter()
"""

# ruff: noqa: S101 -- these are tests, to be run by pytest

from __future__ import annotations

import gc
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from copy import deepcopy
from random import Random
from typing import ClassVar

from specgen.context.stage import Context, ContextStage
from specgen.draft.drafter import Drafter, DraftHints, DraftSession
from specgen.sampling.constraint import Matcher
from specgen.tree import check, path
from specgen.types import MAX_TREE_NODES, TokenTree

_BUDGETS = (1, 2, 5, 17, MAX_TREE_NODES)


class DrafterContract(ABC):
    """Tests of one drafter. Override `drafter`, and the rest where the drafter needs other prompts to draft at all, or
    more time: `longest_seconds` for a tree, where an engine would begin to ask it less and less."""

    vocab_size: ClassVar[int] = 64
    prompts: ClassVar[Sequence[Sequence[int]]] = ((7,), (1, 2, 3, 1, 2, 3, 1, 2), (5, 5, 5, 5), tuple(range(40)))
    longest_seconds: ClassVar[float] = 0.1
    hints: ClassVar[DraftHints] = DraftHints(prediction=(3, 1, 2, 3, 9, 8, 7, 6, 5, 4))

    @abstractmethod
    def drafter(self) -> Drafter:
        """A new drafter for `vocab_size` tokens."""

    @contextmanager
    def session(self, prompt: Sequence[int]) -> Iterator[DraftSession]:
        """A session of a new drafter, closed at the end; the drafter must then hold nothing."""
        drafter = self.drafter()
        with closing(drafter.open(prompt, self.hints)) as session:
            yield session
        drafter.check()

    def ask(self, session: DraftSession, max_nodes: int = MAX_TREE_NODES) -> TokenTree:
        """The session's tree, checked."""
        tree = session.propose(max_nodes)
        assert isinstance(tree, TokenTree), f"propose answers a TokenTree, not {type(tree).__name__}"
        for name, kind in (("tokens", int), ("parents", int), ("confidence", float)):
            values = getattr(tree, name)
            assert isinstance(values, tuple), f"{name} must be a tuple, not {type(values).__name__}"
            wrong = [type(value).__name__ for value in values if not isinstance(value, kind)]
            assert not wrong, f"{name} must hold {kind.__name__}, not {wrong[0]}"
        check(tree, self.vocab_size, max_nodes)
        return tree

    def test_trees_keep_the_contract_within_any_budget(self) -> None:
        """Parents before children, no token twice under one parent, tokens in the vocabulary, no node too many."""
        for prompt in self.prompts:
            with self.session(prompt) as session:
                for most in _BUDGETS:
                    self.ask(session, most)

    def test_no_nodes_asked_for_gives_the_empty_tree(self) -> None:
        """A budget of 0 means that drafting is off for this step."""
        for prompt in self.prompts:
            with self.session(prompt) as session:
                assert len(session.propose(0)) == 0, "propose(0) must answer the empty tree"

    def test_asked_twice_it_answers_the_same(self) -> None:
        """Nothing but what was committed moves a session on, not even a question with another budget."""
        for prompt in self.prompts:
            with self.session(prompt) as session:
                first = self.ask(session)
                self.ask(session, 1)
                assert self.ask(session) == first, "propose must not change what the session answers next"

    def test_the_same_history_gives_the_same_trees(self) -> None:
        """No clock, no global random state: two drafters with the same past agree."""
        for prompt in self.prompts:
            assert self._trees(prompt) == self._trees(prompt), "trees must depend on the session's input alone"

    def test_trees_keep_the_contract_whatever_is_committed(self) -> None:
        """What the target says: all of a path, something else, one token of the vocabulary's edge, a long run."""
        for prompt in self.prompts:
            for runs in ([[0]], [[self.vocab_size - 1]], [[9, 9, 9], [0]], [list(range(self.vocab_size))]):
                with self.session(prompt) as session:
                    for run in runs:
                        session.commit(run)
                        self.ask(session)

    def test_sessions_do_not_see_one_another(self) -> None:
        """What one session commits, and its end, changes nothing in another of the same prompt."""
        for prompt in self.prompts:
            drafter = self.drafter()
            with closing(drafter.open(prompt, self.hints)) as session:
                before = self.ask(session)
                with closing(drafter.open(prompt, self.hints)) as other:
                    assert self.ask(other) == before, "sessions of one prompt must start alike"
                    other.commit([0, 1, 2])
                    self.ask(other)
                    assert self.ask(session) == before, "a commit must not reach another session"
                assert self.ask(session) == before, "the end of a session must not reach another one"
            drafter.check()

    def test_a_batch_is_answered_as_one_by_one(self) -> None:
        """`Drafter.propose` may be clever, but not answer anything else than its sessions do, whoever stands beside."""
        drafter = self.drafter()
        sessions = [drafter.open(prompt, self.hints) for prompt in self.prompts]
        for shift in range(len(_BUDGETS)):
            most = [(0, *_BUDGETS)[(shift + row) % (len(_BUDGETS) + 1)] for row in range(len(sessions))]
            alone = [session.propose(nodes) for session, nodes in zip(sessions, most, strict=True)]
            assert drafter.propose(sessions, most) == alone, "a batch must answer what its sessions answer alone"
        assert drafter.propose([], []) == [], "a batch of none has no trees"
        for session in sessions:
            session.close()
        drafter.check()

    def test_nothing_is_held_after_close(self) -> None:
        """`check` stays silent after a session that was never asked, and one that was closed while another runs."""
        drafter = self.drafter()
        drafter.check()
        idle, busy = (drafter.open(self.prompts[0], self.hints) for _ in range(2))
        busy.commit(self._path(self.ask(busy)))
        idle.close()
        self.ask(busy)
        busy.close()
        drafter.check()

    def test_a_closed_session_is_let_go(self) -> None:
        """A drafter that lists its sessions grows with every request of a server."""
        drafter = self.drafter()
        session = drafter.open(self.prompts[0], self.hints)
        session.commit(self._path(self.ask(session)))
        session.close()
        held = weakref.ref(session)
        del session
        gc.collect()
        assert held() is None, "a drafter must not keep its sessions once they are closed"

    def test_a_tree_takes_no_longer_than_it_may(self) -> None:
        """The quickest of three: what else the machine does is not the drafter's fault."""
        for prompt in self.prompts:
            with self.session(prompt) as session:
                session.commit([prompt[0]])
                seconds = min(_seconds(session) for _ in range(3))
                assert seconds <= self.longest_seconds, f"a tree took {seconds:.3f} s, at most {self.longest_seconds}"

    def _trees(self, prompt: Sequence[int]) -> list[TokenTree]:
        """What a session answers while it is always right, then wrong, then right again."""
        trees = []
        with self.session(prompt) as session:
            for bonus in (0, 1, self.vocab_size - 1, 3):
                trees.append(self.ask(session))
                session.commit([*self._path(trees[-1]), bonus])
        return trees

    @staticmethod
    def _path(tree: TokenTree) -> list[int]:
        """The tokens down to the last node."""
        return [tree.tokens[node] for node in path(tree, len(tree) - 1)]


def _seconds(session: DraftSession) -> float:
    started = time.perf_counter()
    session.propose(MAX_TREE_NODES)
    return time.perf_counter() - started


class ContextStageContract(ABC):
    """Tests of one context stage. Override `stage` and `contexts`: what the stage is given, where it stands in a
    pipeline."""

    contexts: ClassVar[Sequence[Context]] = (Context(max_prompt_tokens=8, ids=(1, 2, 3)),)

    @abstractmethod
    def stage(self) -> ContextStage:
        """A new stage."""

    def test_a_context_comes_back(self) -> None:
        """With ids, if any, as a tuple of whole numbers from 0."""
        stage = self.stage()
        for context in self.contexts:
            answer = stage(context)
            assert isinstance(answer, Context), f"a stage answers a Context, not {type(answer).__name__}"
            assert isinstance(answer.ids, tuple | None), "ids must be a tuple"
            assert all(type(token) is int and token >= 0 for token in answer.ids or ()), "ids must be ints from 0"

    def test_what_was_given_stays_as_it_was(self) -> None:
        """Not even the messages inside may change: the caller keeps them."""
        stage = self.stage()
        for context in self.contexts:
            copy = deepcopy(context)
            stage(context)
            assert context == copy, "a stage must not change its input; answer a copy (dataclasses.replace)"

    def test_the_same_prompt_gives_the_same_context(self) -> None:
        """In any order, from one stage or two: calls leave nothing behind."""
        stage = self.stage()
        forward = [stage(context) for context in self.contexts]
        backward = [self.stage()(context) for context in reversed(self.contexts)]
        assert forward == backward[::-1] == [stage(context) for context in self.contexts], "a stage has no memory"

    def test_the_limit_is_not_the_stages_to_move(self) -> None:
        """`max_prompt_tokens` is the engine's."""
        stage = self.stage()
        for context in self.contexts:
            assert stage(context).max_prompt_tokens == context.max_prompt_tokens, "max_prompt_tokens must stay"


class MatcherContract(ABC):
    """Tests of one kind of constraint. Override `matcher`, and `walks` or `longest` for a grammar of few or long
    texts."""

    walks: ClassVar[int] = 8
    longest: ClassVar[int] = 40

    @abstractmethod
    def matcher(self) -> Matcher:
        """A new matcher at the start of a grammar."""

    def walk(self, seed: int, matcher: Matcher) -> Iterator[int]:
        """Consume allowed tokens by chance until the text is complete; each is answered before it is consumed."""
        random = Random(seed)
        for _ in range(self.longest):
            tokens = matcher.allowed().nonzero().flatten().tolist()
            if not tokens or matcher.is_complete():
                return
            token = random.choice(tokens)
            yield token
            matcher.consume(token)

    def test_what_is_allowed_is_permitted(self) -> None:
        """A draft that the mask allows is never pruned."""
        for seed in range(self.walks):
            matcher, random = self.matcher(), Random(seed)
            for _ in self.walk(seed, matcher):
                tokens = matcher.allowed().nonzero().flatten().tolist()
                for token in random.sample(tokens, min(len(tokens), 8)):
                    assert matcher.permitted([token]) == 1, f"token {token} is allowed and not permitted"

    def test_a_whole_walk_is_permitted_from_its_start(self) -> None:
        """A path of a tree is judged as the walk would go it."""
        for seed in range(self.walks):
            walked = list(self.walk(seed, self.matcher()))
            assert self.matcher().permitted(walked) == len(walked), "a walk must be permitted as a whole"

    def test_asking_changes_nothing(self) -> None:
        """Whatever is asked in between, and even if the mask is written into."""
        for seed in range(self.walks):
            plain, asked = self.matcher(), self.matcher()
            for token in self.walk(seed, plain):
                asked.permitted([token, token, token])
                asked.permitted(list(asked.forced()))
                asked.may_end()
                asked.is_complete()
                mask = asked.allowed()
                assert mask.equal(plain.allowed()), "only consume moves a matcher on"
                mask.logical_not_()
                asked.consume(token)

    def test_copies_go_their_own_way(self) -> None:
        """What one consumes the other does not see."""
        for seed in range(self.walks):
            matcher = self.matcher()
            for token in self.walk(seed, matcher):
                before, twin = matcher.allowed(), matcher.copy()
                assert twin.allowed().equal(before), "a copy stands where the original stands"
                twin.consume(token)
                assert matcher.allowed().equal(before), "a copy must not move the original"

    def test_what_is_forced_is_permitted(self) -> None:
        """A drafter will offer it."""
        for seed in range(self.walks):
            matcher = self.matcher()
            for _ in self.walk(seed, matcher):
                forced = list(matcher.forced())
                assert matcher.permitted(forced) == len(forced), "forced tokens must be permitted"

    def test_what_is_complete_is_whole(self) -> None:
        """And the start is not complete: a sequence draws at least one token."""
        assert not self.matcher().is_complete(), "a grammar must allow more than the empty text"
        for seed in range(self.walks):
            matcher = self.matcher()
            for _ in self.walk(seed, matcher):
                assert not matcher.is_complete(), "nothing may follow what is complete"
            assert matcher.may_end() or not matcher.is_complete(), "what is complete may end"
