"""Greedy decoding over `ModelRunner` with trees that are partly right, and what transformers says alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specgen.kv.pool import BlockTable
from specgen.model.runner import ModelRunner
from specgen.model.segment import Segment, tree_segment
from tests.support.tiny import VOCABULARY

_CHUNK = 7

Tree = tuple[list[int], list[int]]


def generate(model: PreTrainedModel, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """The new tokens of transformers' own greedy generate, with its own cache."""
    ids = torch.tensor([prompt])
    output: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, use_cache=True
    )
    return output[0, len(prompt) :].tolist()


@torch.inference_mode()
def uncached(model: PreTrainedModel, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """Greedy decoding that reads the whole text again for every token."""
    ids = list(prompt)
    for _ in range(new_tokens):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.inference_mode()
def follows(model: PreTrainedModel, prompt: Sequence[int], text: Sequence[int]) -> bool:
    """Whether `text` is what `uncached` would say, in one forward."""
    logits = model(input_ids=torch.tensor([[*prompt, *text]]), use_cache=False).logits[0]
    return bool(logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist() == list(text))


def noisy_tree(rng: random.Random, truth: Sequence[int]) -> Tree:
    """A tree that holds the first tokens of `truth`, or none of them, among wrong nodes; at times it is empty.

    Right nodes have wrong siblings before and behind them, wrong branches two deep hang beside them, and wrong nodes
    hang under right ones.
    """
    tokens: list[int] = []
    parents: list[int] = []

    def hang(parent: int, right: int, token: int | None = None) -> int:
        taken = {t for t, p in zip(tokens, parents, strict=True) if p == parent}
        if token is None:
            token = rng.choice([t for t in range(VOCABULARY) if t != right and t not in taken])
        tokens.append(token)
        parents.append(parent)
        return len(tokens) - 1

    kind = rng.random()
    if kind < 0.1:
        return tokens, parents
    parent, depth = -1, 0 if kind < 0.25 else rng.randint(1, 5)
    for right in [*truth, -1][: depth + 1]:
        for _ in range(rng.randint(0, 2)):
            wrong = hang(parent, right)
            for _ in range(rng.randint(0, 2)):
                wrong = hang(wrong, -1)
        if right == -1 or depth == 0:
            break
        depth -= 1
        before, parent = parent, hang(parent, right, right)
        if rng.random() < 0.5:
            hang(hang(before, right), -1)
    return tokens, parents


@dataclass(slots=True)
class Decoding:
    """One sequence on its way: `ids` is what is committed, the KV of all but the last few of them is in `table`."""

    table: BlockTable
    ids: list[int]
    truth: list[int]
    prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt = len(self.ids)

    @property
    def said(self) -> list[int]:
        return self.ids[self.prompt :]

    @property
    def done(self) -> bool:
        return len(self.said) >= len(self.truth)

    def hang(self, rng: random.Random) -> tuple[Segment, Tree]:
        """The next chunk of what is pending, and a tree under its end when the prompt is through."""
        pending = self.ids[self.table.length :]
        chain = pending[:_CHUNK]
        tree: Tree = noisy_tree(rng, self.truth[len(self.said) :]) if len(chain) == len(pending) else ([], [])
        self.table.reserve(self.table.length + len(chain) + len(tree[0]))
        return tree_segment(self.table, chain, *tree), tree

    def settle(self, chain: int, tree: Tree, logits: Tensor) -> None:
        """Walk the tree with the target's argmax and commit the path; rows of wrong guesses are forgotten."""
        pending = len(self.ids) - self.table.length
        if chain < pending:
            self.table.commit(chain)
            return
        says = logits.argmax(dim=-1).tolist()
        node, accepted = -1, []
        while True:
            token = says[node + 1]
            self.ids.append(token)
            children = (n for n, p in enumerate(tree[1]) if p == node and tree[0][n] == token)
            node = next(children, -2)
            if node == -2:
                break
            accepted.append(chain + node)
        self.table.commit(chain, accepted)


def decode(target: ModelRunner, prompts: Sequence[Sequence[int]], truths: Sequence[Sequence[int]]) -> list[list[int]]:
    """Decode all prompts side by side over noisy trees; the first in consecutive pages, the others in scattered ones.

    Proves on the way that a step is one forward of the model over exactly the rows of its segments, and that all pages
    come back.
    """
    rng = random.Random(1)
    pool = target.pool
    tables = [pool.open() for _ in prompts]
    tables[0].reserve(len(prompts[0]) + len(truths[0]) + 40)
    blockers = _scatter(target)
    decodings = [Decoding(table, list(p), list(t)) for table, p, t in zip(tables, prompts, truths, strict=True)]
    running = list(decodings)
    with model_calls(target.model) as calls:
        while running:
            hung = [decoding.hang(rng) for decoding in running]
            logits = target.forward([segment for segment, _ in hung]).logits
            assert calls.pop() == sum(len(segment.tokens) for segment, _ in hung)
            assert not calls
            wanted = logits.split([len(segment.logits) for segment, _ in hung])
            for decoding, (segment, tree), mine in zip(running, hung, wanted, strict=True):
                decoding.settle(len(segment.tokens) - len(tree[0]), tree, mine)
            pool.check()
            running = [decoding for decoding in running if not decoding.done]
    for table in (*tables, *blockers):
        table.release()
    pool.check()
    assert pool.free_pages == pool.pages
    return [decoding.said[: len(decoding.truth)] for decoding in decodings]


@contextmanager
def model_calls(model: PreTrainedModel) -> Iterator[list[int]]:
    """The number of input tokens of each forward of the model itself."""
    calls: list[int] = []

    def count(module: object, args: object, kwargs: dict[str, Any]) -> None:
        calls.append(kwargs["input_ids"].numel())

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _scatter(target: ModelRunner) -> list[BlockTable]:
    """Take every second free page, so that no two of the others lie side by side; the caller releases the tables."""
    tables = []
    for _ in range(target.pool.free_pages):
        tables.append(target.pool.open())
        tables[-1].reserve(1)
    tables.sort(key=lambda table: table.pages[0])
    for table in tables[::2]:
        table.release()
    return tables[1::2]
