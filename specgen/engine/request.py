"""A request that was checked and tokenised, and how each of its samples draws, ends and shows its text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from specgen.engine.detokenizer import IncrementalDetokenizer
from specgen.lora.adapter import Adapter
from specgen.sampling.constraint import Constrained
from specgen.sampling.params import SamplingParams
from specgen.sampling.sampler import Sampler
from specgen.types import Speculation, StoppingCriterion


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be continued `params.n` times. Built by the API, complete when built.

    ids: the prompt, at least one token. prediction: what the caller expects to follow, as ids.
    speculation: how it drafts: what `params` say, else what the engine does by itself.
    seed: 0 to 2**64 - 1; sample i of the request draws from the stream (seed, i).
    adapter: the revision that `params.adapter` meant when the request was built.
    """

    id: str
    ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    speculation: Speculation
    prediction: tuple[int, ...] = ()
    adapter: Adapter | None = None


@dataclass(frozen=True, slots=True)
class StopRules:
    """What ends a sequence after a token; looked at in this order: end ids, stop strings (the cursor's), criteria, a
    constraint that lets nothing follow, length. `max_length` bounds prompt and output together, and so does
    `min_length`: no token of the first so many is an end id, whatever a processor makes of it."""

    end_ids: frozenset[int]
    max_length: int
    min_length: int = 0
    criteria: tuple[StoppingCriterion, ...] = ()


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """How one sequence of a request draws, ends and speaks; made by whoever builds the request.

    constraint: what holds the sequence to a grammar; its mask is among the sampler's processors.
    """

    sampler: Sampler
    stops: StopRules
    cursor: IncrementalDetokenizer
    constraint: Constrained | None = None


class PreparedRequest(NamedTuple):
    """A request that was checked and tokenised, and how each of its samples draws. It can be run once."""

    request: Request
    samples: list[SampleSpec]
