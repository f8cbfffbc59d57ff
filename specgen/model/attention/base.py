"""Attention backends: the contract between a packed forward and what computes its attention.

A backend prepares a `ForwardBatch` for each forward; the model's layers reach it through `interface.AttentionRoute`
(queries) and `interface.PackedCache` (new keys and values). In all backends the new rows are written to the KV pool,
and every row sees the same keys.

route, how a backend reaches the model's attention:

direct      The model calls transformers' `AttentionInterface`; the backend reads the pool.
gathered    The same, for models that transform what the cache gives back (MLA expands latents): the cache returns the
            keys and values of all segments side by side, attention reads each segment's part.
dense       The model computes attention itself: the cache returns all segments side by side, and a dense mask keeps
            them apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from specgen.kernels.backends import Backend
from specgen.kv.formats import KVFormat, LayerStore
from specgen.kv.pool import KVPool
from specgen.model.attention.reach import Reach
from specgen.model.checks.architecture import Architecture
from specgen.model.segment import Segment

Route: TypeAlias = Literal["direct", "gathered", "dense"]


class AttendingLayer(NamedTuple):
    """One layer as it asks for its attention.

    store: its keys and values in the pool. reach: how far back it looks. scale: of scores. softcap: scores are squashed
    to below it by tanh. sinks: [heads], logits that take a share of the softmax and no value.
    """

    store: LayerStore
    reach: Reach
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None


class ForwardBatch(ABC):
    """The rows of one packed forward, as a backend prepared them. Lives for that forward.

    pool: where keys and values are written. ids, position_ids: int64[1, rows]. wanted: int64[n], the rows whose logits
    are computed. All on the model's device.
    mask: [1, 1, rows, keys] for a model that computes attention itself, which then never calls `attend`.
    """

    pool: KVPool
    ids: Tensor
    position_ids: Tensor
    wanted: Tensor
    mask: Tensor | None = None

    @property
    def offsets(self) -> Tensor:
        """int64[rows]: each row's position less its row number."""
        positions = self.position_ids[0]
        return positions - torch.arange(positions.shape[0], device=positions.device)

    @abstractmethod
    def write(self, store: LayerStore, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Called once a layer, by the model's cache: take the new rows' key and value, [1, kv_heads, rows, dim] each.

        Returns what the model goes on with, and gives to `attend`.
        """

    @abstractmethod
    def attend(self, layer: AttendingLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Called once a layer, after `write`, with query [1, heads, rows, key_dim] and what `write` returned.

        Returns [1, rows, heads, value_dim], contiguous.
        """


class AttentionBackend(Protocol):
    """One way to compute attention, for one model. What it remembers of forwards changes no answer."""

    @property
    def name(self) -> str:
        """What reports call it."""

    @property
    def route(self) -> Route:
        """How it reaches the model's attention."""

    @property
    def kernels(self) -> Backend:
        """Whose kernels it runs."""

    def unusable(self, architecture: Architecture, kv_format: KVFormat) -> str | None:
        """Why it cannot carry this model with KV kept so; `None` if it can. Changes nothing."""

    def invariant(self) -> AttentionBackend | None:
        """The same backend such that a row's bits do not depend on the rows beside it; `None` where there is none."""

    def begin(self, segments: Sequence[Segment], pool: KVPool) -> ForwardBatch:
        """Prepare one forward over `segments`, whose tables own slots of `pool` for all their rows."""
