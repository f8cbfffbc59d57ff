"""A drafter from nothing but its target: write a corpus, cache its states, train, leave a folder that says how."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from specgen import Engine, InvalidRequest, model_digest
from specgen_eagle.corpus import Conversation, read_corpus, replace_file, write_corpus
from specgen_eagle.head_student import HeadStudent
from specgen_eagle.pruned_student import PrunedStudent
from specgen_eagle.recipe import CorpusRecipe, Recipe
from specgen_eagle.states import open_states
from specgen_eagle.training import Point, Student, Trainer

Told = Callable[[str, int, int], None]
"""What is going on, how much is done, of how much."""


def distill(engine: Engine, output: Path, work: Path, recipe: Recipe, told: Told) -> list[Point]:
    """Train a drafter for the engine's model and write it to `output`. What `work` holds is taken up where it stopped.

    Raises InvalidRequest if `work` belongs to another recipe or another target, and for a recipe of which nothing can
    be made with this target.
    """
    _held_out(recipe.corpus.conversations, recipe.corpus)
    # What the target does not fit is refused before hours of writing.
    _student(engine, recipe, [])
    work.mkdir(parents=True, exist_ok=True)
    _claim(work, recipe, model_digest(engine.model))
    for done in write_corpus(engine, work / "corpus.jsonl", recipe.corpus):
        told("conversations", done, recipe.corpus.conversations)
    corpus = read_corpus(work / "corpus.jsonl")
    held_out = _held_out(len(corpus), recipe.corpus)
    student = _student(engine, recipe, corpus[held_out:])
    rows = sum(len(conversation.ids) for conversation in corpus)
    states = open_states(
        engine.model, corpus, student.layers, work / "states.bin", lambda done: told("rows of states", done, rows)
    )
    trainer = Trainer(student, engine.model, states, held_out, recipe.training, work)
    for point in trainer.run():
        told("updates", point.step, recipe.training.steps)
    student.save(output)
    _write_manifest(output, student.kind, engine.model, recipe, trainer.curve)
    return trainer.curve


def _student(engine: Engine, recipe: Recipe, corpus: list[Conversation]) -> Student:
    if recipe.pruned is not None:
        return PrunedStudent(engine.model, recipe, recipe.pruned.layers, engine.tokenizer)
    return HeadStudent(engine.model, recipe, corpus)


def plot(curve: list[Point], path: Path) -> None:
    """The learning curve as a PNG: acceptance per position over updates. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for place in range(len(curve[0].survival)):
        axes.plot([p.step for p in curve], [p.survival[place] for p in curve], label=f"{place + 1} ahead")
    axes.set(xlabel="updates", ylabel="share of chains right, text held out", ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _held_out(conversations: int, recipe: CorpusRecipe) -> int:
    """How many of the conversations are kept for the evaluation."""
    kept = max(1, round(conversations * recipe.held_out))
    if kept >= conversations:
        message = f"held_out is {recipe.held_out}: of {conversations} conversations {kept} are held out"
        raise InvalidRequest(f"{message}, and none is left to train on", param="held_out")
    return kept


def _claim(work: Path, recipe: Recipe, target: str) -> None:
    """Begin a folder for a recipe and a target, or see that it is theirs."""
    said, digest = work / "recipe.json", work / "target"
    if not said.exists():
        replace_file(digest, target.encode())
        replace_file(said, msgspec.json.encode(recipe))
        return
    if msgspec.json.decode(said.read_bytes(), type=Recipe) != recipe:
        raise InvalidRequest(f"{work} was begun with another recipe; choose another folder", param="work")
    if not digest.exists():
        message = f"{work} does not say for which target it was begun; if for this one, delete its recipe.json"
        raise InvalidRequest(f"{message}, else choose another folder", param="work")
    if digest.read_text() != target:
        raise InvalidRequest(f"{work} was begun for another target; choose another folder", param="work")


def _write_manifest(output: Path, kind: str, model: Any, recipe: Recipe, curve: list[Point]) -> None:
    """What the folder holds, for which target, and how well it did on text held out."""
    digest = hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()
    config = model.config.get_text_config(decoder=True)
    manifest = {
        "kind": kind,
        "sha256": {"model.safetensors": digest},
        "target": {
            "model_type": model.config.model_type,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "vocab_size": config.vocab_size,
        },
        "held_out": {"survival": [round(share, 4) for share in curve[-1].survival], "updates": curve[-1].step},
        "recipe": msgspec.to_builtins(recipe),
    }
    (output / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
