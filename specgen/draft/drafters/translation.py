"""A draft model with a tokenizer of its own drafts through text.

It reads what was committed in its own tokens, and each path of its tree is spelt in the target's: drafting at the level
of strings, as in Timor et al. 2025 ("Accelerating LLM Inference with Lossless Speculative Decoding Algorithms for
Heterogeneous Vocabularies"), without matching strings exactly: the walk keeps the text exact whatever is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Annotated, Any, cast

import msgspec
from transformers import PreTrainedTokenizerBase

from specgen._base.options import read_options, takes_options
from specgen.draft.budget import likeliest, survivals
from specgen.draft.drafter import Drafter, DrafterSetup, DraftHints, DraftSession
from specgen.draft.drafters.draft_model import DraftModel, DraftModelSession
from specgen.draft.drafters.spelling import CONTEXT, HALF, Spelling
from specgen.draft.merge import Merged
from specgen.errors import DrafterMismatch, InvalidRequest
from specgen.tree import path, select
from specgen.types import EMPTY_TREE, AnyTokenizer, TokenTree


class DraftModelOptions(msgspec.Struct, frozen=True):
    """model: path or loaded model, required. depth of the tree. width: nodes grown per depth, and children of each."""

    model: Any = None
    depth: Annotated[int, msgspec.Meta(ge=1, le=16)] = 5
    width: Annotated[int, msgspec.Meta(ge=1, le=8)] = 3

    def __post_init__(self) -> None:
        if self.model is None:
            raise InvalidRequest("drafter 'draft-model' needs the option model: a path or a model", param="model")


@takes_options(DraftModelOptions)
def draft_model(setup: DrafterSetup) -> Drafter:
    """The drafter for the option `model`: in the target's own tokens where the tokenizers agree, else through text.

    Raises InvalidRequest without a model, DrafterMismatch when the vocabularies differ and a tokenizer is not known.
    """
    options = read_options("drafter 'draft-model'", setup.options, DraftModelOptions)
    if setup.load_model is None:
        raise InvalidRequest("drafter 'draft-model' needs an engine that loads models", param="model")
    model, tokenizer = setup.load_model(options.model)
    if _same_tokens(setup, model.vocab_size, tokenizer):
        shared = min(model.vocab_size, setup.vocab_size)
        return DraftModel(model, shared, depth=options.depth, width=options.width)
    drafter = DraftModel(model, model.vocab_size, depth=options.depth, width=options.width)
    return TranslatedDraftModel(drafter, Translation(setup.tokenizer, tokenizer, setup.vocab_size))


def _same_tokens(setup: DrafterSetup, vocab_size: int, tokenizer: AnyTokenizer | None) -> bool:
    if setup.tokenizer is not None and tokenizer is not None:
        ours, theirs = (cast(PreTrainedTokenizerBase, one).get_vocab() for one in (setup.tokenizer, tokenizer))
        return bool(ours == theirs)
    if vocab_size == setup.vocab_size:
        return True
    missing = "the engine has none" if setup.tokenizer is None else "there is none beside the draft model"
    raise DrafterMismatch(
        f"drafter 'draft-model' has a vocabulary of {vocab_size}, the target of {setup.vocab_size}; choose a "
        "draft model that shares the target's tokenizer, or give the tokenizers of both, so that it can draft "
        f"through text: {missing}"
    )


class Translation:
    """Between a target's tokens and a draft model's. Guesses all of it, so a tokenizer that does not fit costs no text.

    A target's special token is read as the draft model's of the same name, or as the characters of its name; a target's
    begin of text that the draft model does not know is left out, and its own is put where its tokenizer puts one.
    """

    def __init__(self, target: Any, draft: Any, vocab_size: int) -> None:
        self.target, self.draft = Spelling(target), Spelling(draft)
        self.special = _special_tokens(draft, target)
        self._vocab_size = vocab_size
        own = draft.bos_token_id
        self._opening = [own] if own is not None and draft.encode("", add_special_tokens=True)[:1] == [own] else []
        theirs = getattr(target, "bos_token", None)
        self._foreign = [] if theirs is None or theirs in draft.get_vocab() else [target.bos_token_id]

    def revision(self, ids: list[int], before: int, draft_ids: Sequence[int]) -> tuple[int, list[int]]:
        """How many of `draft_ids`, which say `ids[:before]`, stay, and what comes behind them so that all of `ids` is
        said. Looks at the last of them alone, unless it turns out that they were spelt otherwise."""
        start = max(0, before - CONTEXT)
        old, new = (self.draft.ids(self.target.text(ids[start:stop])) for stop in (before, len(ids)))
        same = _common(old, new)
        kept = len(draft_ids) - len(old) + same
        if same and kept > 0 and list(draft_ids[kept - 1 :]) == old[same - 1 :]:
            return kept, new[same:]
        whole = self._whole(ids)
        kept = _common(draft_ids, whole)
        return kept, whole[kept:]

    def _whole(self, ids: list[int]) -> list[int]:
        heard = ids[1:] if ids[:1] == self._foreign else ids
        said = self.draft.ids(self.target.text(heard))
        return said if said[:1] == self._opening else self._opening + said

    def tree(self, ids: Sequence[int], read: int, drafted: TokenTree) -> TokenTree:
        """The target's tokens behind `ids` on all paths of `drafted`, a tree of draft tokens behind `ids[:read]`.

        A path is left out where the target would have spelt `ids` otherwise, had it been about to say it.
        """
        start = max(0, read - CONTEXT)
        before = self.target.text(ids[start:read])
        # As committed, or where that was cut at an odd place or is odd itself, as the tokenizer would write it.
        begun = [list(ids[start:]), [*self.target.ids(before), *ids[read:]]]
        said: list[str] = []
        for node, parent in enumerate(drafted.parents):
            tokens = [drafted.tokens[step] for step in path(drafted, node)]
            said.append(self.draft.lengthened(said[parent] if parent >= 0 else "", tokens))
        survival = survivals(drafted)
        leaves = sorted(set(range(len(drafted))) - set(drafted.parents))
        paths = ([_Step(drafted.tokens[n], said[n], survival[n]) for n in path(drafted, leaf)] for leaf in leaves)
        chains = [self._chain(before, begun, steps) for steps in paths]
        return Merged(chains).surest([chain.confidence for chain in chains])

    def _chain(self, before: str, begun: Sequence[list[int]], steps: Sequence[_Step]) -> TokenTree:
        """The target's tokens for what `steps` say behind the text `before`, which was spelt as one of `begun`."""
        plain = list(takewhile(lambda step: step.token not in self.special, steps))
        spelt = self.target.ids(before + (plain[-1].whole if plain else ""))
        committed = next((len(ids) for ids in begun if spelt[: len(ids)] == ids), None)
        if committed is None:
            return EMPTY_TREE
        tokens: list[int] = []
        reached: list[float] = []
        written = ""
        for token in takewhile(lambda token: token < self._vocab_size, spelt[committed:]):
            tokens.append(token)
            written = self.target.lengthened(written, tokens)
            reached.append(
                next((step.survival for step in plain if len(step.whole) >= len(written)), steps[-1].survival)
            )
        for step in steps[len(plain) : len(plain) + 1]:
            if len(tokens) == len(spelt) - committed and (end := self.special[step.token]) is not None:
                tokens.append(end)
                reached.append(step.survival)
        return _falling(tokens, reached)


@dataclass(frozen=True, slots=True)
class _Step:
    """A drafted token, the text of the path down to it, and the chance that the path is right so far."""

    token: int
    said: str
    survival: float

    @property
    def whole(self) -> str:
        """The text without a half character at its end."""
        return self.said.rstrip(HALF)


def _falling(tokens: Sequence[int], reached: Sequence[float]) -> TokenTree:
    """A chain of tokens, given the chance that the text goes on as far as each."""
    chances = list(accumulate(reached, min))
    confidence = (chance / above if above else 0.0 for chance, above in zip(chances, (1.0, *chances), strict=False))
    return TokenTree(tuple(tokens), tuple(range(-1, len(tokens) - 1)), tuple(confidence))


def _special_tokens(draft: Any, target: Any) -> Mapping[int, int | None]:
    """The target's token for each special token of the draft: of the same name, or both ends of text; else None."""
    known = target.get_vocab()
    special = {token: known.get(added.content) for token, added in draft.added_tokens_decoder.items() if added.special}
    if special.get(draft.eos_token_id) is None and draft.eos_token_id is not None:
        special[draft.eos_token_id] = getattr(target, "eos_token_id", None)
    return special


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


class TranslatedDraftModel(Drafter):
    """A draft model behind a translation."""

    def __init__(self, drafter: DraftModel, translation: Translation) -> None:
        self.drafter = drafter
        self.translation = translation

    def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
        """A session; the prompt is translated when drafts are asked for behind the first commit."""
        return _Session(self, prompt, self.drafter.open((), hints))

    def propose(self, sessions: Sequence[DraftSession], max_nodes: Sequence[int]) -> list[TokenTree]:
        """One tree per session, grown by the draft model for the whole batch at once."""
        self.drafter.token_seconds = self.token_seconds
        own = [session for session in sessions if isinstance(session, _Session)]
        for session in own:
            session.catch_up()
        drafted = self.drafter.propose([session.inner for session in own], max_nodes)
        return [session.translated(tree, most) for session, tree, most in zip(own, drafted, max_nodes, strict=True)]

    def check(self) -> None:
        """As the draft model's."""
        self.drafter.check()


class _Session(DraftSession):
    """`ids` are the target's, of which `inner` has the first `read` in its own tokens."""

    def __init__(self, drafter: TranslatedDraftModel, prompt: Sequence[int], inner: DraftModelSession) -> None:
        self._drafter = drafter
        self._prompt_length = len(prompt)
        self.ids = list(prompt)
        self.read = 0
        self.inner = inner

    def propose(self, max_nodes: int) -> TokenTree:
        return self._drafter.propose([self], [max_nodes])[0]

    def commit(self, tokens: Sequence[int]) -> None:
        self.ids.extend(tokens)

    def close(self) -> None:
        self.inner.close()

    def catch_up(self) -> None:
        """Say in the draft's tokens all whole characters that were committed."""
        translation = self._drafter.translation
        readable = translation.target.readable(self.ids)
        # As with one tokenizer: the first token does not wait until another model has read the prompt.
        if len(self.ids) > self._prompt_length and readable != self.read:
            self.inner.revise(*translation.revision(self.ids[:readable], self.read, self.inner.ids))
            self.read = readable

    def translated(self, tree: TokenTree, max_nodes: int) -> TokenTree:
        """The target's tree of at most `max_nodes` nodes for the draft's `tree`."""
        translated = self._drafter.translation.tree(self.ids, self.read, tree)
        return select(translated, likeliest(translated, max_nodes))
