"""The inputs of a packed forward, from its segments."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from specgen.model.segment import Segment


def input_tensors(segments: Sequence[Segment], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and positions, int64[1, rows] each, on the device, and the rows whose logits are wanted, int64[n]."""
    tokens, positions = flat_rows(segments)
    ids, position_ids = torch.tensor([[tokens], [positions]], device=device)
    return ids, position_ids, torch.tensor(wanted_rows(segments), dtype=torch.int64)


def flat_rows(segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
    """The tokens of all rows, and their positions."""
    tokens = [token for segment in segments for token in segment.tokens]
    return tokens, [position for segment in segments for position in segment.new_positions]


def wanted_rows(segments: Sequence[Segment]) -> list[int]:
    """The rows whose logits are wanted, counted over the whole forward."""
    starts = accumulate((len(segment.tokens) for segment in segments), initial=0)
    return [start + row for start, segment in zip(starts, segments, strict=False) for row in segment.logits]
