"""What an adapter does to a model's layers, and how an engine is told to keep adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from specgen._base.ranges import check_ranges
from specgen.errors import InvalidRequest


@dataclass(frozen=True, slots=True, eq=False)
class LoraLayer:
    """What an adapter makes of a linear layer's output y for its input x: `y * gain + offset + (x @ down.T) @ up`.

    down: [rank, inputs], up: [rank, outputs] with all scaling in it; the model's dtype, contiguous.
    gain, offset: [outputs], `None` where they change nothing (DoRA and `lora_bias` need them).
    """

    down: Tensor
    up: Tensor
    gain: Tensor | None = None
    offset: Tensor | None = None

    @property
    def rank(self) -> int:
        """Numbers between `down` and `up`."""
        return self.down.shape[0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: tensor for name, tensor in named if tensor is not None}


@dataclass(frozen=True, slots=True, eq=False)
class LoraWeights:
    """An adapter's layers by the names of the modules that they adapt, in one memory."""

    layers: Mapping[str, LoraLayer]

    @property
    def bytes(self) -> int:
        """What the tensors take."""
        return sum(tensor.nbytes for layer in self.layers.values() for tensor in layer.tensors.values())


@dataclass(slots=True, eq=False, weakref_slot=True)
class Adapter:
    """One revision of an adapter: what requests hold on to, and where its weights are. Changed by `AdapterCache` alone.

    revision: sha256 of its files, in short. base: the model that its config names. path: of its folder, as it was
    given; draft_path: of the one for the draft model, if one is paired. any_base: whether bases of other names will do.
    weights, draft_weights: on the device, always while a sequence runs under it; the latter for a paired draft model.
    parts: the same in host memory, by whose they are, or else in `file`. coming: on the way to the device.
    users: sequences that run or wait. running: those that run. retired: no request may ask for it any more.
    failure: why its weights cannot be brought back.
    """

    name: str
    revision: str
    path: str | Path
    draft_path: str | Path | None
    any_base: bool
    rank: int
    base: str | None
    bytes: int
    parts: Mapping[str, LoraWeights] | None
    pinned: bool = False
    weights: LoraWeights | None = None
    draft_weights: LoraWeights | None = None
    file: Path | None = None
    coming: bool = False
    users: int = 0
    running: int = 0
    retired: bool = False
    failure: BaseException | None = None

    @property
    def resident(self) -> LoraWeights:
        """The weights on the device. Raises RuntimeError where they are not: never is a row left unadapted."""
        if self.weights is None:
            raise RuntimeError(f"adapter {self.name!r} is not on the device, though a sequence runs under it")
        return self.weights


class AdapterOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an engine keeps adapters.

    root: the folder that all adapters lie in; then paths are relative to it and may not lead out. `None`: any path.
    max_rank: the largest rank of any layer.
    device_bytes: most bytes of adapters beside the model, those that run and the last ones that did.
    host_bytes: most bytes in host memory, over both those and the others.
    disk_bytes: most bytes in a folder of the engine's own, for those that host memory has no room for.
    Loading more than host memory and that folder hold together is refused.
    """

    root: str | Path | None = None
    max_rank: Annotated[int, Meta(ge=0)] = 64
    device_bytes: Annotated[int, Meta(ge=0)] = 1 << 30
    host_bytes: Annotated[int, Meta(ge=0)] = 4 << 30
    disk_bytes: Annotated[int, Meta(ge=0)] = 16 << 30

    def __post_init__(self) -> None:
        if not isinstance(self.root, str | Path | None):
            raise InvalidRequest(f"adapters.root is {self.root!r}; it must be a folder", param="adapters")
        check_ranges(self, owner="adapters.", param="adapters")

    @classmethod
    def of(cls, value: Mapping[str, Any] | AdapterOptions) -> AdapterOptions:
        """Read what a user may write: a mapping of the fields. Raises InvalidRequest for anything else."""
        if isinstance(value, AdapterOptions):
            return value
        known = ", ".join(cls.__struct_fields__)
        if not isinstance(value, Mapping):
            raise InvalidRequest(f"adapters is {value!r}; it must be a mapping of {known}", param="adapters")
        try:
            return cls(**value)
        except TypeError as error:
            raise InvalidRequest(f"adapters: {error}; fields: {known}", param="adapters") from None


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, quantised or not."""
    return isinstance(module, Conv1D) or isinstance(getattr(module, "in_features", None), int)
