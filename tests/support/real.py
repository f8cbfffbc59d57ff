"""The real model at work: jobs with settings and ways to draft, what they must say, and where they say it otherwise."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import torch
from specgen_echo import EchoDrafter, EchoOptions
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from benchmarks.harness import Prompt
from specgen import DrafterFactory, Engine, Result, StepOutput, Stream, hookimpl
from specgen.kernels.reference import uniforms
from specgen.sampling.params import SamplingParams
from specgen.types import Speculation

ECHOES = {
    "echo-0": EchoOptions(hit_rate=0.0, depth=2),
    "echo-50": EchoOptions(hit_rate=0.5, depth=3),
    "echo-100": EchoOptions(hit_rate=1.0, depth=8),
}
"""Drafters that know the truth and say it never, half of the time and always."""

MODES = {
    "off": Speculation(max_nodes=0),
    "prompt-lookup": Speculation(drafters=("prompt-lookup",), max_nodes=12, adaptive=False),
    "recycling": Speculation(drafters=("recycling",), max_nodes=12, adaptive=False),
    "draft-model": Speculation(drafters=("draft-model",), max_nodes=4, adaptive=False),
    "echo-0": Speculation(drafters=("echo-0",), max_nodes=3, adaptive=False),
    "echo-50": Speculation(drafters=("echo-50",), adaptive=False),
    "echo-100": Speculation(drafters=("echo-100",), adaptive=False),
    # All at once: trees are merged, and with the last the clock decides which nodes are verified.
    "together": Speculation(
        drafters=("echo-50", "prompt-lookup", "recycling", "draft-model", "echo-100"), max_nodes=24, adaptive=False
    ),
    "auto": Speculation(),
}


class Moody(LogitsProcessor):
    """Counts its calls and bans the favourites of earlier ones in every third: a call too many, too few or out of order
    changes what is drawn. Not every third by the ids' length, so a call repeated on the same ids shows too."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self._favourites: deque[int] = deque(maxlen=7)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores, less the favourites if this call is a third one."""
        self.lengths.append(input_ids.shape[1])
        banned = list(self._favourites) if len(self.lengths) % 3 == 0 else []
        self._favourites.append(int(scores[0].argmax()))
        scores = scores.clone()
        scores[:, banned] = -torch.inf
        return scores


SETTINGS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "greedy": lambda: {"temperature": 0.0},
    "plain": lambda: {"temperature": 1.0},
    "filters": lambda: {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "min-p": lambda: {"temperature": 1.3, "min_p": 0.05, "repetition_penalty": 1.2},
    "penalties": lambda: {
        "temperature": 0.0,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.4,
        # "the", " the", " a" and a line break: what most texts hold.
        "logit_bias": {1195: -2.0, 260: -1.5, 253: 1.0, 198: 0.75},
    },
    "typical": lambda: {
        "temperature": 1.0,
        "typical_p": 0.8,
        "no_repeat_ngram_size": 3,
        "bad_words": ("you", "is", "of the"),
    },
    "moody": lambda: {"temperature": 0.7, "processors": (Moody(),)},
}
"""Made anew for each run, since processors keep state."""


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt to be continued under a setting, drafted for in one way. The seed belongs to prompt and setting."""

    prompt: Prompt
    setting: str
    mode: str

    def __str__(self) -> str:
        return f"{self.prompt.id}, {self.setting}, {self.mode}"

    @property
    def seed(self) -> int:
        """The same for every mode."""
        return crc32(f"{self.prompt.id} {self.setting}".encode())


@dataclass(frozen=True, slots=True)
class Running:
    """A job that was submitted, with the options it runs under."""

    job: Job
    stream: Stream
    options: Mapping[str, Any]

    def result(self) -> Result:
        """Wait for its end."""
        return self.stream.results()[0]


class Observer:
    """A plugin that offers the echoes and sees how many sequences gained tokens in one step."""

    def __init__(self) -> None:
        self.widest = 0

    @hookimpl
    def drafters(self) -> Mapping[str, DrafterFactory]:
        """One drafter for each hit rate."""
        return {name: lambda setup, o=options: EchoDrafter(setup.vocab_size, o) for name, options in ECHOES.items()}

    @hookimpl
    def on_step(self, outputs: Sequence[StepOutput]) -> None:
        """Count those that gained tokens."""
        self.widest = max(self.widest, sum(1 for output in outputs if output.tokens))


class Bench:
    """Runs jobs of at most `tokens` tokens on one engine and knows what each of them must say."""

    def __init__(self, engine: Engine, tokens: int) -> None:
        self.engine = engine
        self.tokens = tokens
        self._truths: dict[tuple[str, str], tuple[int, ...]] = {}

    def start(self, jobs: Iterable[Job]) -> list[Running]:
        """Submit jobs, whose truths must be known unless speculation is off."""
        return [self._start(job) for job in jobs]

    def truth(self, job: Job) -> tuple[int, ...]:
        """The ids of the job, as `learn` found them."""
        return self._truths[job.prompt.id, job.setting]

    def learn(self, jobs: Iterable[Job], *, alone: bool = True) -> None:
        """Find out the truths of jobs: transformers' own ids if greedy, else those with speculation off.

        alone: one job after the other, with nobody else there.
        """
        unknown = {(job.prompt.id, job.setting): replace(job, mode="off") for job in jobs}
        unknown = {key: job for key, job in unknown.items() if key not in self._truths}
        for key, job in unknown.items():
            if job.setting == "greedy":
                self._truths[key] = by_transformers(self.engine.model, job.prompt.ids, self.tokens)
        sampled = [job for job in unknown.values() if job.setting != "greedy"]
        for batch in [[job] for job in sampled] if alone else [sampled]:
            for running in self.start(batch):
                self._truths[running.job.prompt.id, running.job.setting] = running.result().ids

    def flaws(self, running: Sequence[Running]) -> str:
        """Wait for the end of all jobs; what is wrong with them, a line each."""
        for run in running:
            run.result()
        found = [flaw for run in running for flaw in self._flaws(run)]
        return "\n".join(found and [f"{len(found)} flaws in {len(running)} jobs", *found])

    def is_cut(self, victim: Running) -> bool:
        """Wait for the end of a job that was cancelled; whether it said the truth as far as it went."""
        ids = victim.result().ids
        return ids == self.truth(victim.job)[: len(ids)]

    def _start(self, job: Job) -> Running:
        speculation = MODES[job.mode]
        options = SETTINGS[job.setting]() | {
            "max_tokens": self.tokens,
            "seed": job.seed,
            "speculation": speculation,
            "prediction": self.truth(job) if speculation.max_nodes else (),
        }
        return Running(job, self.engine.stream(list(job.prompt.ids), **options), options)

    def _flaws(self, running: Running) -> list[str]:
        job, result, truth = running.job, running.result(), self.truth(running.job)
        if result.ids != truth:
            return [difference(self.engine, job, truth, result.ids, self.tokens)]
        start = len(job.prompt.ids)
        found = [
            f"the processor saw {len(processor.lengths)} calls for {len(truth)} tokens, or not in order"
            for processor in running.options.get("processors", ())
            if processor.lengths != list(range(start, start + len(truth)))
        ]
        return [f"{job}: {flaw}" for flaw in (*found, *_drafting_flaws(job.mode, result))]


def by_transformers(model: PreTrainedModel, prompt: Sequence[int], tokens: int) -> tuple[int, ...]:
    """The greedy continuation by `model.generate`, the end token included."""
    ids = torch.tensor([prompt], device=model.device)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
    return tuple(found[0, len(prompt) :].tolist())


def _drafting_flaws(mode: str, result: Result) -> list[str]:
    """Whether drafts were made and taken as the mode implies. Only the echoes promise anything for a single job."""
    stats, length = result.stats, len(result.ids)
    drafted, accepted = stats.num_draft_tokens, stats.num_accepted_draft_tokens
    found = [
        f"drafter {name} was switched off: {share.disabled}"
        for name, share in stats.by_drafter.items()
        # On a busy machine a drafter may be found too slow; that is no flaw here.
        if share.disabled and not share.disabled.startswith("took")
    ]
    if mode == "off" and drafted:
        found.append(f"{drafted} tokens were drafted")
    if mode == "echo-0" and (not drafted or accepted):
        found.append(f"{accepted} of {drafted} drafted tokens were accepted")
    steps = -(-length // (ECHOES["echo-100"].depth + 1))
    if mode == "echo-100" and stats.num_spec_steps != steps:
        found.append(f"{stats.num_spec_steps} steps for {length} tokens, where {steps} do")
    return found


def difference(engine: Engine, job: Job, truth: Sequence[int], found: Sequence[int], tokens: int) -> str:
    """Where two runs of one job part, and how near a tie it was by transformers' own forward over that text."""
    same = (a == b for a, b in zip(truth, found, strict=False))
    at = next((index for index, equal in enumerate(same) if not equal), min(len(truth), len(found)))
    if at in (len(truth), len(found)):
        return f"{job}: {len(truth)} tokens expected, {len(found)} found, equal as far as both go"
    scores = _perturbed_scores(engine, job, truth[:at], tokens)
    (best, second), (first, other) = (part.tolist() for part in scores.topk(2))
    return (
        f"{job}: differs first at token {at}: expected {truth[at]} of score {float(scores[truth[at]]):.7f}, "
        f"found {found[at]} of score {float(scores[found[at]]):.7f}; "
        f"the best two are {first} and {other}, {best - second:.2e} apart"
    )


@torch.no_grad()
def _perturbed_scores(engine: Engine, job: Job, output: Sequence[int], tokens: int) -> Tensor:
    """float64[vocab]: what the argmax after `output` is taken of, noise included if the job is sampled."""
    params = SamplingParams.of(SETTINGS[job.setting]() | {"max_tokens": tokens, "seed": job.seed})
    sampler = engine._builder.build(list(job.prompt.ids), params, copies=False)[1][0].sampler
    ids = torch.tensor([[*job.prompt.ids, *output]], device=engine.target.device)
    logits = engine.model(ids, logits_to_keep=len(output) + 1).logits[0].float()
    # Every position, since processors may keep state.
    for index, row in enumerate(logits):
        prefix = ids[:, : len(job.prompt.ids) + index]
        scores = row[None].clone()
        for processor in sampler._processors:
            scores = processor(prefix, scores)
    perturbed = scores[0].double()
    if sampler._greedy:
        return perturbed
    noise = uniforms(sampler._keys[ids.shape[1]], torch.arange(len(perturbed), device=ids.device))
    return perturbed - torch.log(-torch.log(noise))
