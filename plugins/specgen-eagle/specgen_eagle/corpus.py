"""Training text from nothing but the target: it writes user turns, and answers them (as Magpie does, Xu et al. 2024).

A line of the file is one conversation: the ids of the whole, and where the answer begins. Conversation i depends on
the recipe and i alone, so a run that was cut off goes on where it stopped and ends the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from specgen import Engine, InvalidRequest
from specgen_eagle.recipe import CorpusRecipe

_TURN = "\x02"
_GREEDY_CYCLE = 20
_ANSWERS = 1 << 32  # their seeds lie behind those of the turns


class Conversation(msgspec.Struct, frozen=True):
    """ids: prompt, answer and its end. answer: the first id of the answer."""

    ids: list[int]
    answer: int


def read_corpus(path: Path) -> list[Conversation]:
    """All whole lines."""
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [msgspec.json.decode(line, type=Conversation) for line in whole.splitlines()]


def replace_file(path: Path, content: bytes) -> None:
    """Write a file as a whole: cut off, it leaves what was there."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_bytes(content)
    beside.replace(path)


def write_corpus(engine: Engine, path: Path, recipe: CorpusRecipe) -> Iterator[int]:
    """Write what is missing, batch by batch; yields how many conversations there are after each.

    Raises InvalidRequest if the engine has no tokenizer with a chat template.
    """
    before, after = _around_a_turn(engine.tokenizer)
    there = read_corpus(path)
    # A line that was cut off, and a batch that was, are written again.
    done = len(there) // recipe.batch * recipe.batch if len(there) < recipe.conversations else len(there)
    kept = b"".join(msgspec.json.encode(conversation) + b"\n" for conversation in there[:done])
    if not path.exists() or path.read_bytes() != kept:
        replace_file(path, kept)
    for start in range(done, recipe.conversations, recipe.batch):
        numbers = range(start, min(start + recipe.batch, recipe.conversations))
        written = _write(engine, recipe, numbers, before, after)
        with path.open("ab") as file:
            file.writelines(msgspec.json.encode(conversation) + b"\n" for conversation in written)
        yield numbers.stop


def _write(
    engine: Engine, recipe: CorpusRecipe, numbers: Sequence[int], before: list[int], after: list[int]
) -> list[Conversation]:
    tokenizer: Any = engine.tokenizer
    drawn = {"temperature": recipe.temperature, "top_k": recipe.top_k, "top_p": recipe.top_p}
    openers = [recipe.openers[number % len(recipe.openers)] for number in numbers]
    starts = [before + tokenizer(opener, add_special_tokens=False)["input_ids"] for opener in openers]
    turns = _generate(engine, starts, [{**drawn, "seed": recipe.seed + n} for n in numbers], recipe.turn_tokens)
    ends = set(_end_ids(engine))
    prompts = [start + [i for i in turn if i not in ends] + after for start, turn in zip(starts, turns, strict=True)]
    ways = [
        {"temperature": 0.0} if _is_greedy(n, recipe) else {**drawn, "seed": recipe.seed + _ANSWERS + n}
        for n in numbers
    ]
    answers = _generate(engine, prompts, ways, recipe.answer_tokens)
    return [Conversation([*prompt, *answer], len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]


def _generate(
    engine: Engine, prompts: Sequence[list[int]], options: Sequence[dict[str, Any]], most: int
) -> list[tuple[int, ...]]:
    """All prompts at once, each with options of its own."""
    streams = [engine.stream(p, max_tokens=most, **o) for p, o in zip(prompts, options, strict=True)]
    return [stream.results()[0].ids for stream in streams]


def _is_greedy(number: int, recipe: CorpusRecipe) -> bool:
    return number * 7 % _GREEDY_CYCLE < recipe.greedy * _GREEDY_CYCLE


def _end_ids(engine: Engine) -> list[int]:
    """Those that end the engine's texts: the model's, else the tokenizer's."""
    ends = engine.model.generation_config.eos_token_id
    if ends is None:
        ends = getattr(engine.tokenizer, "eos_token_id", None)
    if ends is None:
        return []
    return list(ends) if isinstance(ends, Sequence) else [ends]


def _around_a_turn(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the chat template puts before the first user turn, and between it and the answer."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise InvalidRequest("a corpus needs a tokenizer with a chat template; this model has none", param="model")
    message = [{"role": "user", "content": _TURN}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, _, after = text.partition(_TURN)
    return tuple(tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))
