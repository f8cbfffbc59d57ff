"""The law of the walk, in exact arithmetic over all small trees, and of the real sampler by counting.

"In exact arithmetic": every outcome of the draws is tried and weighted with its probability in float64, so a law is
compared to twelve digits and no seed is involved. The same check must reject walks that are nearly right.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from specgen.draft.drafter import Drafter, DraftHints, DraftSession
from specgen.sampling.sampler import PositionKeys, gumbel_argmax
from specgen.sampling.verify import DrawToken, acceptance, walk
from specgen.tree import chain, children
from specgen.types import Finish, Logprob, Result, Speculation, TokenTree
from tests.support.bench import Bench
from tests.support.tiny import build

TOKENS = 3
LONGEST = 7

Path = tuple[int, ...]
Walked = tuple[Path, Path, Finish | None]
Walk = Callable[[TokenTree, DrawToken], Walked]


# The target: for every path a distribution over three tokens, drawn once at random.


class Law:
    """p(.|path) for all paths of up to seven tokens, and the probability of each path."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.next = [rng.dirichlet([0.6] * TOKENS, (TOKENS,) * depth) for depth in range(LONGEST)]
        # Here and there one token is impossible, as after a top-k: what has no chance must never be said.
        for table in self.next:
            odd = (rng.integers(3 * TOKENS, size=table.shape[:-1])[..., None] == np.arange(TOKENS)) & (table < 1)
            table[odd] = 0.0
            table /= table.sum(axis=-1, keepdims=True)
        self.text = [np.ones(())]
        for table in self.next:
            self.text.append(self.text[-1][..., None] * table)

    def chance(self, path: Path, token: int) -> float:
        """p(token | path)."""
        return float(self.next[len(path)][path][token])

    def after(self, path: Path, length: int) -> np.ndarray:
        """The law of what plain draws add to `path` until the text has `length` tokens."""
        rest = np.ones(())
        for depth in range(len(path), length):
            rest = rest[..., None] * self.next[depth][path]
        return rest


LAWS = [Law(seed) for seed in (1, 2)]


@cache
def branchings(nodes: int) -> tuple[tuple[Path, ...], ...]:
    """Everything that can hang under one node, with `nodes` nodes in all: sets of paths, each with its beginnings.

    A tree without duplicate siblings is such a set, so these are all shapes with all assignments of tokens.
    """
    found = []
    for sizes in itertools.product(range(nodes + 1), repeat=TOKENS):
        if sum(sizes) != nodes:
            continue
        choices = [branchings(size - 1) if size else ((),) for size in sizes]
        for below in itertools.product(*choices):
            paths: list[Path] = []
            for token, (size, subtree) in enumerate(zip(sizes, below, strict=True)):
                if size:
                    paths += [(token,), *((token, *path) for path in subtree)]
            found.append(tuple(paths))
    return tuple(found)


def trees(nodes: int) -> Iterator[TokenTree]:
    """All trees of so many nodes, each numbered at random, parents before children."""
    rng = random.Random(nodes)
    for paths in branchings(nodes):
        left, placed = list(paths), {(): -1}
        tokens, parents = [], []
        while left:
            path = rng.choice([path for path in left if path[:-1] in placed])
            left.remove(path)
            placed[path] = len(tokens)
            tokens.append(path[-1])
            parents.append(placed[path[:-1]])
        yield TokenTree(tuple(tokens), tuple(parents), (1.0,) * len(tokens))


def path_to(tree: TokenTree, node: int) -> Path:
    """The tokens from the root down to `node`; the root's is empty."""
    return () if node < 0 else (*path_to(tree, tree.parents[node]), tree.tokens[node])


class OutOfScript(Exception):
    """The walk draws once more than the script says."""


class Script:
    """Says what is drawn, and how likely that is: a draw at a node has the law of that node's row, which the target
    computed for the path to it in the tree."""

    def __init__(self, tree: TokenTree, law: Law, says: Path) -> None:
        self.tree, self.law, self.says = tree, law, says
        self.drawn = 0
        self.weight = 1.0

    def draw(self, node: int) -> tuple[int, Finish | None]:
        """The next token of the script."""
        if self.drawn == len(self.says):
            raise OutOfScript
        token = self.says[self.drawn]
        self.drawn += 1
        self.weight *= self.law.chance(path_to(self.tree, node), token)
        return token, None


def outcomes(walk: Walk, tree: TokenTree, law: Law) -> dict[tuple[Path, Path], float]:
    """(committed, accepted nodes) -> probability, over everything that the draws may say."""
    found: dict[tuple[Path, Path], float] = Counter()
    scripts: list[Path] = [()]
    while scripts:
        script = Script(tree, law, scripts.pop())
        try:
            committed, nodes, _ = walk(tree, script.draw)
        except OutOfScript:
            if script.weight > 0:
                scripts += [(*script.says, token) for token in range(TOKENS)]
        else:
            found[committed, nodes] += script.weight
    return found


def error_of(walk: Walk, tree: TokenTree, law: Law) -> float:
    """How far the law of the text is from p: what is committed, then plain draws up to a fixed length."""
    length = max((len(path_to(tree, node)) for node in range(len(tree))), default=0) + 2
    text = np.zeros((TOKENS,) * length)
    for (committed, _), weight in outcomes(walk, tree, law).items():
        text[committed] += weight * law.after(committed, length)
    return float(abs(text - law.text[length]).max())


@pytest.mark.parametrize("nodes", range(6))
def test_the_text_has_the_targets_law_for_every_tree(nodes: int) -> None:
    """All 1772 trees of up to five nodes over three tokens, under two random targets."""
    count = 0
    for tree in trees(nodes):
        count += 1
        for law in LAWS:
            assert error_of(walk, tree, law) < 1e-12, tree
    assert count == (1, 3, 12, 55, 273, 1428)[nodes], "these are the ternary trees"


@pytest.mark.parametrize("nodes", range(1, 6))
def test_acceptance_at_a_node_is_the_sum_of_p_over_its_children(nodes: int) -> None:
    """The most that any lossless rule can reach for that set of children."""
    for tree in trees(nodes):
        law = LAWS[0]
        found = outcomes(walk, tree, law)
        for node, below in enumerate(children(tree), -1):
            reached = sum(weight for (_, taken), weight in found.items() if node in (-1, *taken))
            stepped = sum(weight for (_, taken), weight in found.items() if set(taken) & set(below.values()))
            path = path_to(tree, node)
            assert stepped == pytest.approx(reached * sum(law.chance(path, token) for token in below), abs=1e-12)


def test_committed_is_what_the_accepted_nodes_hold_and_one_token_more() -> None:
    """For every outcome of every tree of four nodes; the bonus is the token that no child has."""
    for tree in trees(4):
        below = children(tree)
        for committed, nodes in outcomes(walk, tree, LAWS[0]):
            assert committed[:-1] == tuple(tree.tokens[node] for node in nodes)
            assert committed[:-1] == path_to(tree, (-1, *nodes)[-1])
            assert committed[-1] not in below[(-1, *nodes)[-1] + 1]


# Walks that look right and are not.


def trusting(tree: TokenTree, draw: DrawToken) -> Walked:
    """Takes the first child as it is and draws only at the end."""
    node, committed, nodes = -1, [], []
    while below := children(tree)[node + 1]:
        token, node = next(iter(below.items()))
        committed.append(token)
        nodes.append(node)
    return (*committed, draw(node)[0]), tuple(nodes), None


def redrawing(tree: TokenTree, draw: DrawToken) -> Walked:
    """Draws a second time where no child holds the first draw."""
    committed, nodes, _ = walk(tree, draw)
    return (*committed[:-1], draw((-1, *nodes)[-1])[0]), nodes, None


def late(tree: TokenTree, draw: DrawToken) -> Walked:
    """Draws at the parent's row."""
    return walk(tree, lambda node: draw(tree.parents[node] if node >= 0 else -1))


def insisting(tree: TokenTree, draw: DrawToken) -> Walked:
    """Gives each child a draw of its own: the best of several tries."""
    node, committed, nodes = -1, [], []
    while True:
        below = children(tree)[node + 1]
        token = next((token for token in below if draw(node)[0] == token), None)
        if token is None:
            return (*committed, draw(node)[0]), tuple(nodes), None
        committed.append(token)
        nodes.append(node := below[token])


@pytest.mark.parametrize("wrong", [trusting, redrawing, late, insisting])
def test_the_check_rejects_a_walk_that_is_nearly_right(wrong: Walk) -> None:
    """Were this to pass, the check above would prove nothing."""
    errors = [error_of(wrong, tree, law) for tree in trees(3) for law in LAWS]
    # A few trees cannot tell: where the target is certain, or all its tokens hang there.
    assert sum(error > 1e-3 for error in errors) > len(errors) / 2


# Stop rules and log-probabilities ride along.


def test_a_stop_rule_ends_the_walk_at_a_token_that_stands_in_the_tree() -> None:
    """What ends the text is the last committed token and no accepted node, and nothing is drawn behind it."""
    drawn = []

    def draw(node: int) -> tuple[int, Finish | None]:
        drawn.append(node)
        return (4, 5, 6)[len(drawn) - 1], Finish("stop", 5) if len(drawn) == 2 else None

    assert walk(chain((4, 5, 6, 7)), draw) == ((4, 5), (0,), Finish("stop", 5))
    assert drawn == [-1, 0]


def test_each_committed_token_is_scored_at_the_row_it_was_drawn_from() -> None:
    """The root's row for the first, then the row of the node before."""
    says = iter((7, 8, 9))
    tree = TokenTree((3, 7, 8, 8), (-1, -1, 1, 0), (1.0,) * 4)
    found = acceptance(tree, lambda _: (next(says), None), lambda node, token: Logprob(token, float(node)))
    assert (found.committed, found.nodes) == ((7, 8, 9), (1, 2))
    assert [(score.token, score.logprob) for score in found.logprobs] == [(7, -1.0), (8, 1.0), (9, 2.0)]


# The real sampler, by counting.


def p_value(counts: Sequence[int], law: Sequence[float]) -> float:
    """Pearson's chi-square: how likely counts as far off as these are under `law`. Rare cells count as one."""
    total = sum(counts)
    cells = [(count, total * chance) for count, chance in zip(counts, law, strict=True)]
    assert not any(count for count, expected in cells if expected == 0), "something impossible was drawn"
    rare = [cell for cell in cells if cell[1] < 5]
    cells = [cell for cell in cells if cell[1] >= 5]
    if sum(expected for _, expected in rare) > 1:
        cells.append((sum(count for count, _ in rare), sum(expected for _, expected in rare)))
    assert len(cells) > 3, "too few draws for this test"
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


SCORES = torch.tensor([0.3, -1.0, 2.1, -math.inf, 0.0, 1.5, -2.2, 0.9])
SHARES = torch.softmax(SCORES.double(), dim=0).tolist()


def drawn(keys: Sequence[int]) -> list[int]:
    return [gumbel_argmax(SCORES, key) for key in keys]


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_draws_at_the_positions_of_a_text_follow_softmax(seed: int) -> None:
    keys = PositionKeys(seed)
    counts = Counter(drawn([keys[position] for position in range(8000)]))
    observed = [counts[token] for token in range(len(SHARES))]
    assert p_value(observed, SHARES) > 1e-3
    hotter = torch.softmax(SCORES.double() / 1.15, dim=0).tolist()
    assert p_value(observed, hotter) < 1e-6, "so many draws tell a temperature of 1.15 from 1"


def test_draws_of_neighbouring_positions_samples_and_seeds_are_independent() -> None:
    """All pairs of a draw and its neighbour in the next position, sample or seed follow the product law."""
    product = [a * b for a in SHARES for b in SHARES]
    here = drawn([PositionKeys(seed)[40] for seed in range(8001)])
    samples = drawn([PositionKeys(seed, 1)[40] for seed in range(8000)])
    ahead = drawn([PositionKeys(seed)[41] for seed in range(8000)])
    for other in (ahead, samples, here[1:]):
        counts = Counter(zip(here, other, strict=False))
        observed = [counts[a, b] for a in range(len(SHARES)) for b in range(len(SHARES))]
        assert p_value(observed, product) > 1e-3
    mixed = [b if seed % 10 else a for seed, (a, b) in enumerate(zip(here, ahead, strict=False))]
    counts = Counter(zip(here, mixed, strict=False))
    observed = [counts[a, b] for a in range(len(SHARES)) for b in range(len(SHARES))]
    assert p_value(observed, product) < 1e-6, "so many draws tell if one in ten repeats its neighbour"


pytestmark = pytest.mark.usefixtures("one_thread")


ALLOWED = (5, 23, 42)
PROMPT = [7, 11, 13]


class Bushy(Drafter):
    """Drafts most of what the allowed tokens can say next, and some of what they cannot, whatever was committed."""

    def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
        return _Bush()


class _Bush(DraftSession):
    def propose(self, max_nodes: int) -> TokenTree:
        tokens = (5, 60, 42, 23, 42, 5, 61, 42, 23, 5)
        parents = (-1, -1, -1, 0, 0, 2, 1, 3, 7, 8)
        return TokenTree(tokens, parents, (1.0,) * len(tokens))

    def commit(self, tokens: Sequence[int]) -> None:
        pass


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


@torch.inference_mode()
def texts(model: PreTrainedModel, length: int, temperature: float) -> dict[Path, float]:
    """The law of the model's next `length` tokens among the allowed ones."""
    law: dict[Path, float] = {(): 1.0}
    for _ in range(length):
        grown = {}
        for path, chance in law.items():
            logits = model(input_ids=torch.tensor([[*PROMPT, *path]])).logits[0, -1].double()
            shares = torch.softmax(logits[list(ALLOWED)] / temperature, dim=0).tolist()
            grown |= {(*path, token): chance * share for token, share in zip(ALLOWED, shares, strict=True)}
        law = grown
    return law


def sampled(model: PreTrainedModel, speculation: Speculation, seeds: range, temperature: float) -> list[Result]:
    """Three tokens for each of 128 samples of each seed, by the engine's own loop."""
    bench = Bench(model, {"bushy": Bushy()}, max_num_seqs=64)
    params = {"temperature": temperature, "allowed_token_ids": ALLOWED, "max_tokens": 3, "n": 128}
    for seed in seeds:
        bench.add(PROMPT, seed=seed, speculation=speculation, **params)
    bench.run()
    return sorted(bench.results.values(), key=lambda result: (result.seed, result.index))


def test_the_engine_with_trees_draws_from_the_models_own_law(model: PreTrainedModel) -> None:
    """1024 texts of three tokens, drafted as bushy trees, against softmax of transformers' logits."""
    temperature = 4.0
    law = texts(model, 3, temperature)
    results = sampled(model, Speculation(adaptive=False), range(8), temperature)
    counts = Counter(result.ids for result in results)
    assert len(results) == 1024
    assert set(counts) <= set(law), "a token was drawn that is not allowed"
    observed = [counts[text] for text in law]
    assert p_value(observed, list(law.values())) > 1e-3
    assert p_value(observed, [1 / len(law)] * len(law)) < 1e-6, "so many texts tell the model's law from an even one"

    # The trees took part, and the coins are those of decoding without trees.
    assert sum(result.stats.num_accepted_draft_tokens for result in results) > len(results)
    plain = sampled(model, Speculation(max_nodes=0), range(2), temperature)
    assert [result.ids for result in plain] == [result.ids for result in results[: len(plain)]]
    assert all(result.stats.num_draft_tokens == 0 for result in plain)
