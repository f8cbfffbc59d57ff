"""Draws at many rows, and what the sampler draws there one by one through transformers' warpers."""

from __future__ import annotations

import torch
from torch import Tensor

from specgen.kernels.draws import Draw
from specgen.sampling.params import SamplingParams
from specgen.sampling.sampler import PositionKeys, Sampler, processors

SETTINGS = (
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 2.0, "min_p": 0.1},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 1e-3, "top_p": 0.5},
    {"temperature": 5.0, "top_k": 1},
)


def sampled(logits: Tensor) -> tuple[list[Draw], list[int]]:
    """Each setting at each row of logits [rows, vocab], row i being of position i; and the sampler's tokens."""
    draws, tokens = [], []
    for options in SETTINGS:
        params = SamplingParams(**options)  # type: ignore[arg-type]
        found = processors(params, prompt_length=0, end_ids=(), encode=lambda _: [], custom=(), device=logits.device)
        sampler = Sampler(found, greedy=False, keys=PositionKeys(11, 2))
        assert sampler.warp is not None
        for position in range(len(logits)):
            ids = torch.zeros(1, position, dtype=torch.int64, device=logits.device)
            draws.append(Draw(position, sampler.key(position), sampler.warp))
            tokens.append(sampler.draw(ids, logits[position : position + 1]))
    return draws, tokens
