"""Train an adapter here from its recipe, on two cores in some minutes: `python -m adapters.train json-answers`.

The data are made from templates, so nothing is downloaded but the demo model. Beside PEFT's files it writes
`manifest.json`: what the files are, what they were trained on, and what the adapter changes, counted on prompts that
it was not trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.data import TASKS, Task
from specgen.demo_model import demo_model

ROOT = Path(__file__).parent
_IGNORED = -100
_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What `recipe.toml` says."""

    task: str
    seed: int
    steps: int
    batch: int
    learning_rate: float
    lora: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Recipe:
        """Of an adapter's folder."""
        return cls(**tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8")))


def example(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of a conversation, and what is learnt at each: the answer and its end alone."""
    prompt = prompt_ids(tokenizer, question)
    said = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    return prompt + said, [_IGNORED] * len(prompt) + said


def prompt_ids(tokenizer: Any, question: str) -> list[int]:
    """A question as the chat template asks it."""
    messages = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


def batches(recipe: Recipe, task: Task, tokenizer: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """ids, attention mask and labels, int64[batch, longest] each, padded on the right."""
    draws = random.Random(recipe.seed)
    for _ in range(recipe.steps):
        rows = [example(tokenizer, *task.draw(draws)) for _ in range(recipe.batch)]
        longest = max(len(ids) for ids, _ in rows)
        padding = [longest - len(ids) for ids, _ in rows]
        yield (
            torch.tensor([ids + [0] * n for (ids, _), n in zip(rows, padding, strict=True)]),
            torch.tensor([[1] * len(ids) + [0] * n for (ids, _), n in zip(rows, padding, strict=True)]),
            torch.tensor([labels + [_IGNORED] * n for (_, labels), n in zip(rows, padding, strict=True)]),
        )


def train(recipe: Recipe, model: Any, tokenizer: Any) -> Any:
    """The adapted model after the recipe's steps of AdamW, the rate falling to nothing along a line."""
    torch.manual_seed(recipe.seed)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **recipe.lora))
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / recipe.steps)
    adapted.train()
    for step, (ids, mask, labels) in enumerate(batches(recipe, TASKS[recipe.task], tokenizer)):
        logits = adapted(input_ids=ids, attention_mask=mask).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=_IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return adapted.eval()


@torch.inference_mode()
def effect(task: Task, model: Any, tokenizer: Any, questions: Sequence[str]) -> float:
    """The share of greedy answers that are as the task wants them."""
    good = 0
    for question in questions:
        ids = torch.tensor([prompt_ids(tokenizer, question)])
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=80)
        good += task.is_good(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))
    return good / len(questions)


def save(adapted: Any, folder: Path) -> None:
    """Write PEFT's files in bfloat16, which is half as large; the card stays as it is."""
    card = folder / "README.md"
    before = card.read_text(encoding="utf-8") if card.exists() else None
    adapted.peft_config["default"].base_model_name_or_path = _BASE
    adapted.to(torch.bfloat16).save_pretrained(folder)
    card.unlink()  # what peft wrote
    if before is not None:
        card.write_text(before, encoding="utf-8")


def manifest(folder: Path, recipe: Recipe, measured: dict[str, float], minutes: float) -> dict[str, Any]:
    """What is said of an adapter beside its files."""
    files = ("adapter_config.json", "adapter_model.safetensors")
    return {
        "name": folder.name,
        "base": _BASE,
        "kind": "lora",
        "rank": recipe.lora["r"],
        "sha256": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files},
        "effect": {"measure": TASKS[recipe.task].measure, **measured},
        "minutes": round(minutes, 1),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure and write."""
    options = argparse.ArgumentParser(prog="python -m adapters.train", description=__doc__)
    options.add_argument("name", help="a folder here with a recipe.toml")
    options.add_argument("--out", type=Path, help="where to write; default: that folder")
    options.add_argument("--steps", type=int, help="instead of the recipe's")
    args = options.parse_args(argv)
    folder = args.out or ROOT / args.name
    recipe = Recipe.read(ROOT / args.name)
    if args.steps is not None:
        recipe = Recipe(recipe.task, recipe.seed, args.steps, recipe.batch, recipe.learning_rate, recipe.lora)
    task, source = TASKS[recipe.task], demo_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    before = effect(task, model, tokenizer, task.held_out)
    started = time.monotonic()
    adapted = train(recipe, model, tokenizer)
    minutes = (time.monotonic() - started) / 60
    after = effect(task, adapted, tokenizer, task.held_out)
    save(adapted, folder)
    written = manifest(folder, recipe, {"base": before, "adapted": after}, minutes)
    (folder / "manifest.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(written["effect"]))


if __name__ == "__main__":
    main()
