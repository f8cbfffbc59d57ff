"""What a training run is made of, in one file that repeats it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from specgen import InvalidRequest

Positive = Annotated[int, msgspec.Meta(ge=1)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class CorpusRecipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The text that the target writes for itself.

    conversations: how many. batch: how many are written at once.
    openers: how user turns begin, in turns; "" leaves the turn to the target.
    turn_tokens, answer_tokens: most tokens of a user turn and of an answer.
    greedy: share of the answers that are greedy; the others are drawn at `temperature`, `top_k` (0: all) and `top_p`,
    as all turns are. Over a large vocabulary `top_k` is much cheaper than `top_p`.
    held_out: share of the conversations that is kept for the evaluation.
    """

    conversations: Positive = 2000
    batch: Positive = 48
    openers: tuple[str, ...] = ("",)
    turn_tokens: Positive = 160
    answer_tokens: Positive = 256
    greedy: Share = 0.7
    temperature: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    top_k: Annotated[int, msgspec.Meta(ge=0)] = 0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.95
    held_out: Share = 0.03
    seed: int = 0


class HeadRecipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An EAGLE-3 head. layers: hidden states it reads, as transformers counts them; the default is near the bottom, in
    the middle and near the top. vocabulary: how many of the tokens in the corpus, the most frequent ones, it can say.
    intermediate: width of its feed-forward layer; the default is the target's. parallel: how many tokens it says in one
    forward; more than 1 make it a parallel head, for which `ahead` of the training has no meaning. start: folder of a
    head whose weights, layers, vocabulary and width it begins with, in place of what is said here.
    """

    layers: tuple[int, ...] = ()
    vocabulary: Positive = 8192
    intermediate: Positive | None = None
    parallel: Annotated[int, msgspec.Meta(ge=1, le=16)] = 1
    start: str = ""


class PrunedRecipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A draft model. layers: those of the target that it keeps, ascending, from 0."""

    layers: tuple[int, ...]


class TrainingRecipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """steps: updates. tokens: rows per update. ahead: how many steps a head is unrolled on its own output (EAGLE-3's
    training-time test). learning_rate: its peak, after `warmup` updates and before a cosine decay to a tenth.
    """

    steps: Positive = 2000
    tokens: Positive = 4096
    ahead: Annotated[int, msgspec.Meta(ge=1, le=8)] = 4
    learning_rate: Annotated[float, msgspec.Meta(gt=0)] = 1e-3
    warmup: Positive = 100
    decay: Share = 0.8
    evaluate_every: Positive = 250
    seed: int = 0


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A drafter and how it is made: a head, or with `pruned` a draft model."""

    corpus: CorpusRecipe = CorpusRecipe()
    head: HeadRecipe = HeadRecipe()
    pruned: PrunedRecipe | None = None
    training: TrainingRecipe = TrainingRecipe()


SMOKE = Recipe(
    corpus=CorpusRecipe(conversations=48, batch=16, turn_tokens=12, answer_tokens=40, held_out=0.25),
    head=HeadRecipe(vocabulary=64),
    training=TrainingRecipe(steps=120, tokens=512, ahead=3, learning_rate=3e-3, warmup=10, evaluate_every=40),
)
"""A run of a minute, for a tiny model."""


def read_recipe(path: Path) -> Recipe:
    """A recipe from a TOML file. Raises InvalidRequest, naming the field, for what a recipe does not know."""
    try:
        return msgspec.toml.decode(path.read_bytes(), type=Recipe)
    except (msgspec.DecodeError, OSError) as error:
        raise InvalidRequest(f"{path} is no recipe: {error}", param="recipe") from error
