"""A Hugging Face causal LM behind one packed forward: no padding, KV in a pool, logits only where they are wanted."""

from __future__ import annotations

import copy
import inspect
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specgen.errors import InvalidRequest, UnsupportedModel
from specgen.kernels.cpu_kernels import available
from specgen.kv.formats import NATIVE, KVFormat
from specgen.kv.pool import PAGE_SIZE, KVPool
from specgen.kv.segment import Segment
from specgen.model.architecture import context_limit, inspect_layers
from specgen.model.attention import PackedAttention, PackedCache, Seam
from specgen.model.batch import Batch, dense_mask
from specgen.model.calibration import centre_keys
from specgen.model.invariance_check import CHECK_PAGES, check_invariance
from specgen.model.invariant import InvariantLayers
from specgen.model.packed_linear import pack_linears
from specgen.model.seam_check import choose_seam

_FULL_CONTEXTS = 16
_SEAM_CHECK_PAGES = 2
_LONGEST_CONTEXT = 1 << 20


class Target:
    """A model that scores rows of many sequences in one forward.

    Loading proves that the packed forward says what the model says alone, on a small tree; a model for which it does
    not is refused. The caller's model is never touched: `model` is a twin of it that shares its weights.

    kv_tokens: tokens the KV pool holds; `None` takes a quarter of the free memory, at most 16 full contexts.
    max_context: most tokens of one sequence; `None` takes what the model's positions allow. LongRoPE models stay below
        their original length: behind it one text would change how another is read.
    kv_format: how the pool keeps keys and values. calibration: ids of a text, for formats that centre keys.
    invariant: compute each row so that its bits do not depend on the rows beside it, which loading proves. `None` does
        so for formats that round, where the last bit of a sum may be a step of the code, below float64.
    Raises UnsupportedModel, naming the layer and what to do instead, and InvalidRequest for sizes below 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        kv_tokens: int | None = None,
        max_context: int | None = None,
        kv_format: KVFormat = NATIVE,
        calibration: Sequence[int] = (),
        invariant: bool | None = None,
        cpu_kernels: bool = True,
    ) -> None:
        for name, size in (("kv_tokens", kv_tokens), ("max_context", max_context)):
            if size is not None and size < 1:
                raise InvalidRequest(f"{name} is {size}; it must be at least 1", param=name)
        self.model = model = twin(model).eval()
        self.device = model.device
        self.architecture = inspect_layers(model)
        self.vocab_size = self.architecture.vocab_size
        self.forwards = 0
        self.rows = 0
        rounds = not kv_format.lossless and self.architecture.dtype != torch.float64
        self.invariant = rounds if invariant is None else invariant
        self._kernel = False
        if cpu_kernels and available(self.device, self.architecture.dtype):
            pack_linears(model)
            self._kernel = len(set(self.architecture.stores)) == len(self.architecture.stores)
        self._attention = PackedAttention(
            model, self.architecture.reaches, self.architecture.stores, invariant=self.invariant
        )
        self._layers = InvariantLayers(model) if self.invariant else None
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        context = min(n for n in (context_limit(model), max_context, _LONGEST_CONTEXT) if n is not None)
        # The check compares with the model itself, so it keeps KV as it is; the real pool comes after.
        self.seam = Seam.DIRECT
        self.pool = self._make_pool(_SEAM_CHECK_PAGES, NATIVE)
        self.seam = self._choose_seam()
        if self.invariant:
            self._check_invariance(kv_format, asked=invariant is True)
        tokens = kv_tokens or self._affordable_tokens(context, kv_format)
        self.pool = self._make_pool(max(2, -(-tokens // PAGE_SIZE)), kv_format)
        self.context_length = min(context, self.pool.capacity)
        if kv_format.centred:
            centre_keys(self.pool, model, calibration, self.architecture)
        self.forwards = self.rows = 0

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Score all rows in one forward and write their KV behind each segment's prefix.

        The tables must own the slots (`BlockTable.reserve`). Returns float32[wanted rows, vocab], segment by segment.
        """
        kernel = self._kernel and self.seam is Seam.DIRECT and self.pool.kind.lossless
        batch = Batch(segments, self.pool, gathered=self.seam is not Seam.DIRECT, kernel=kernel)
        wanted = _wanted_rows(segments)
        tokens = [token for segment in segments for token in segment.tokens]
        positions = [p for segment in segments for p in segment.positions[segment.tail - len(segment.tokens) :]]
        ids, position_ids = torch.tensor([[tokens], [positions]], device=self.device)
        dense = self.seam is Seam.DENSE
        self.forwards += 1
        self.rows += batch.rows
        with (
            nullcontext() if dense else self._attention.over(batch),
            self._layers.active() if self._layers else nullcontext(),
        ):
            logits: Tensor = self.model(
                input_ids=ids,
                position_ids=position_ids,
                past_key_values=PackedCache(batch, self.architecture.stores),
                attention_mask=dense_mask(batch, self.architecture.dtype) if dense else None,
                use_cache=True,
                **({"logits_to_keep": wanted} if self._keeps_logits else {}),
            ).logits[0]
        return (logits if self._keeps_logits else logits[wanted]).float()

    def row_seconds(self, rows: int) -> float:
        """Seconds of one forward over `rows` rows of one text, measured now: the faster of two, after a first one."""
        table = self.pool.open()
        try:
            table.reserve(rows)
            segment = Segment(table, [0] * rows, range(rows), None, range(rows))
            self.forward([segment])
            seconds = min(self._timed(segment) for _ in range(2))
        finally:
            table.release()
        self.forwards -= 3
        self.rows -= 3 * rows
        return seconds

    def _timed(self, segment: Segment) -> float:
        started = time.perf_counter()
        self.forward([segment])
        return time.perf_counter() - started

    def _choose_seam(self) -> Seam:
        """With the attention kernel if the packed forward is the model's own with it."""
        if self._kernel:
            try:
                if (seam := choose_seam(self)) is Seam.DIRECT:
                    return seam
            except UnsupportedModel:
                pass  # then without it
        self._kernel = False
        return choose_seam(self)

    def _check_invariance(self, kv_format: KVFormat, *, asked: bool) -> None:
        """With KV as it is, where a difference cannot hide behind rounding, and as it will be kept."""
        instead = "load it without" if asked else f"without it kv_format={kv_format.name!r} is not exact: take 'native'"
        instead += ", or invariant=False, and drafting may change the last bits, and so at times the text"
        for kind in dict.fromkeys((NATIVE, kv_format)):
            self.pool = self._make_pool(CHECK_PAGES, kind)
            check_invariance(self, instead)

    def _make_pool(self, pages: int, kind: KVFormat) -> KVPool:
        return KVPool(self.architecture.shapes, pages, dtype=self.architecture.dtype, device=self.device, kind=kind)

    def _affordable_tokens(self, context: int, kv_format: KVFormat) -> int:
        per_token = kv_format.bytes_per_token(self.architecture.shapes, self.architecture.dtype)
        return min(_FULL_CONTEXTS * context, max(PAGE_SIZE, _free_memory(self.device) // 4 // per_token))


def _wanted_rows(segments: Sequence[Segment]) -> Tensor:
    starts = accumulate((len(segment.tokens) for segment in segments), initial=0)
    return torch.tensor(
        [start + row for start, segment in zip(starts, segments, strict=False) for row in segment.logits],
        dtype=torch.int64,
    )


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same modules around the same weights, with a config of their own.

    A packed forward goes through other attention than the caller's own calls do, which may run at the same time.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=shared)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
