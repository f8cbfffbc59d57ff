"""What tests of the engine's loop share: drafters that say what a test wants, a tokenizer of letters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel

from specgen import (
    Drafter,
    DrafterSetup,
    DraftHints,
    DraftSession,
    TokenTree,
)
from specgen.draft.drafters.draft_model import DraftModel
from specgen.draft.drafters.prediction import Prediction
from specgen.draft.drafters.prompt_lookup import PromptLookup
from specgen.model.runner import load_runner
from specgen.tree import path
from tests.support.bench import echoes
from tests.support.tiny import VOCABULARY


def drafted_by(model: PreTrainedModel, *, kv_tokens: int = 2048, **options: int) -> DraftModel:
    return DraftModel(load_runner(model, kv_tokens=kv_tokens), VOCABULARY, **options)


def all_drafters(smaller: PreTrainedModel) -> dict[str, Drafter]:
    plain = DrafterSetup(VOCABULARY)
    return {
        "prediction": Prediction(plain),
        "prompt-lookup": PromptLookup(plain),
        "draft-model": drafted_by(smaller, depth=3, width=2),
        "echo-0": echoes(0.0),
        "echo-half": echoes(0.5),
        "echo-1": echoes(1.0, siblings=2, depth=6),
    }


MODES: dict[str, Any] = {
    "off": "off",
    "auto": "auto",
    "everything, whatever it costs": {"adaptive": False},
    "one node": {"adaptive": False, "max_nodes": 1},
    "prediction": {"adaptive": False, "drafters": ["prediction"]},
    "prompt lookup": {"adaptive": False, "drafters": ["prompt-lookup"]},
    "draft model": {"adaptive": False, "drafters": ["draft-model"]},
    "echo, never right": {"adaptive": False, "drafters": ["echo-0"]},
    "echo, half right": {"adaptive": False, "drafters": ["echo-half"]},
    "echo, always right": {"adaptive": False, "drafters": ["echo-1"]},
}


class Scripted(Drafter):
    """Offers what a function of the ids committed so far says, whatever budget it is given."""

    def __init__(self, tree: Callable[[list[int]], Any]) -> None:
        self.tree = tree
        self.sessions = 0

    def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
        self.sessions += 1
        return _Scripted(self, prompt)

    def check(self) -> None:
        if self.sessions < 0:
            raise RuntimeError("a session was closed twice")


class _Scripted(DraftSession):
    def __init__(self, drafter: Scripted, prompt: Sequence[int]) -> None:
        self.drafter = drafter
        self.ids = list(prompt)

    def propose(self, max_nodes: int) -> TokenTree:
        return self.drafter.tree(self.ids)

    def commit(self, tokens: Sequence[int]) -> None:
        self.ids.extend(tokens)

    def close(self) -> None:
        self.drafter.sessions -= 1


EAGER = {"adaptive": False}


BUSH = TokenTree((1, 2, 3, 4, 5, 6, 7), (-1, -1, 0, 0, 1, 2, 5), (0.5,) * 7)


def paths(tree: TokenTree) -> dict[tuple[int, ...], float]:
    """Every path of a tree with its confidence."""
    return {tuple(tree.tokens[step] for step in path(tree, node)): tree.confidence[node] for node in range(len(tree))}
