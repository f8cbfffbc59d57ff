"""How the pool keeps a token's key and value: as they are, or in fewer bits.

Every format encodes each token alone, once, when it is written. So a rejected row is simply forgotten: there is no
full-precision tail, nothing is flushed later and nothing is rolled back, and what a token's KV reads as does not
depend on what was drafted, batched or cached around it.

Rotation (QuaRot, Ashkboos et al. 2024): heads are rotated by an orthonormal Hadamard matrix, which spreads outlier
channels; scores are kept by rotating the query too, and the output is rotated back once.
Centring: a constant vector taken off all keys of a head moves every score of a query alike, so its mean over a text
can be taken off before the keys are rounded, and is put back when they are read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from specgen.errors import UnsupportedModel
from specgen.kernels.kv_codes import SIZES_DTYPE, affine4, hadamard, rotated, scaled
from specgen.kernels.kv_layout import Coding, LayerPlanes, Layout


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Key and value of one token in one layer: `kv_heads` x `key_dim` and `kv_heads` x `value_dim`."""

    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class Plane:
    """One tensor of a layer's store: what it holds for each slot."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes per slot."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Coder(ABC):
    """Vectors to planes and back, each vector alone. `x` is float[n, heads, dim]."""

    lossless: ClassVar[bool] = False
    """Whether `decode` answers what `encode` was given, to the bit."""
    coding: ClassVar[Coding | None] = None
    """How GPU kernels read it, if they can; else plain torch does."""

    @abstractmethod
    def planes(self, heads: int, dim: int, dtype: torch.dtype) -> tuple[Plane, ...]:
        """What is kept of `heads` vectors of `dim` numbers of `dtype`."""

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """One tensor per plane, [n, *plane.shape]."""

    @abstractmethod
    def decode(self, planes: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """What the planes stand for, as `dtype`."""


class _AsIs(Coder):
    """The model's own dtype."""

    lossless = True
    coding = Coding.PLAIN

    def planes(self, heads: int, dim: int, dtype: torch.dtype) -> tuple[Plane, ...]:
        return (Plane((heads, dim), dtype),)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x,)

    def decode(self, planes: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return planes[0]


class _Scaled(Coder):
    """One scale per vector, symmetric: int8 or float8_e4m3fn."""

    coding = Coding.SCALED

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def planes(self, heads: int, dim: int, dtype: torch.dtype) -> tuple[Plane, ...]:
        return Plane((heads, dim), self._dtype), Plane((heads, 1), SIZES_DTYPE)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return scaled(x, self._dtype)

    def decode(self, planes: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        codes, scale = planes
        return (codes.float() * scale.float()).to(dtype)


class _FourBit(Coder):
    """Sixteen levels, evenly spaced; two codes a byte."""

    coding = Coding.AFFINE4

    def planes(self, heads: int, dim: int, dtype: torch.dtype) -> tuple[Plane, ...]:
        if dim % 2:
            raise UnsupportedModel(f"KV heads of {dim} numbers cannot be kept in 4 bits; choose int8 or fp8")
        return Plane((heads, dim // 2), torch.uint8), Plane((heads, 2), SIZES_DTYPE)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return affine4(x)

    def decode(self, planes: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        packed, affine = planes
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
        low, scale = affine[..., :1].float(), affine[..., 1:].float()
        x: Tensor = codes.float() * scale + low
        return x.to(dtype)


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How keys and values are kept. Offered by plugins through the hook `kv_formats`.

    rotated: rotate heads by a Hadamard matrix first. centred: take each key channel's mean over a text off first.
    """

    name: str
    key: Coder
    value: Coder
    rotated: bool = False
    centred: bool = False

    @property
    def lossless(self) -> bool:
        """Whether keys and values are read as they were written, to the bit."""
        return self.key.lossless and self.value.lossless and not (self.rotated or self.centred)

    def planes(self, shape: LayerShape, dtype: torch.dtype) -> tuple[Plane, ...]:
        """The planes of one layer, keys first."""
        keys = self.key.planes(shape.kv_heads, shape.key_dim, dtype)
        return keys + self.value.planes(shape.kv_heads, shape.value_dim, dtype)

    def bytes_per_token(self, layers: Sequence[LayerShape], dtype: torch.dtype) -> int:
        """Bytes that one token takes in all layers together."""
        return sum(plane.bytes for shape in layers for plane in self.planes(shape, dtype))


class LayerStore:
    """One layer of a pool: planes of [slots, ...], and what turns keys and values into them and back."""

    def __init__(self, kind: KVFormat, shape: LayerShape, dtype: torch.dtype, planes: Sequence[Tensor]) -> None:
        self.kind = kind
        self._shape = shape
        self.dtype = dtype
        self.planes = tuple(planes)
        self._keys = len(kind.key.planes(shape.kv_heads, shape.key_dim, dtype))
        device = planes[0].device
        self._center = torch.zeros(shape.kv_heads, shape.key_dim, device=device) if kind.centred else None
        self._key_rotation = hadamard(shape.key_dim, device) if kind.rotated else None
        self._value_rotation = hadamard(shape.value_dim, device) if kind.rotated else None

    @property
    def rotated(self) -> bool:
        """Whether `read` answers rotated heads: then rotate the query before attention and the output after it."""
        return self.kind.rotated

    @cached_property
    def kernel_planes(self) -> LayerPlanes:
        """The planes as kernels know them. Raises UnsupportedModel where a coder is none of theirs."""
        kind, (keys, values) = self.kind, (self.planes[: self._keys], self.planes[self._keys :])
        if kind.key.coding is None or kind.value.coding is None:
            raise UnsupportedModel(f"kv_format {kind.name!r} is none that the GPU kernels read")
        dims = self._shape.key_dim, self._shape.value_dim
        layout = Layout(self._shape.kv_heads, *dims, kind.key.coding, kind.value.coding, kind.rotated)
        key_sizes, value_sizes = (planes[1] if len(planes) > 1 else None for planes in (keys, values))
        return LayerPlanes(layout, keys[0], values[0], key_sizes, value_sizes, self._center)

    def rotate_query(self, query: Tensor) -> Tensor:
        """Queries [rows, heads, key_dim] as the keys are kept, so that scores stay what they are."""
        return rotated(query, self._key_rotation)

    def rotate_output(self, output: Tensor) -> Tensor:
        """Attention's output [rows, heads, value_dim] rotated back; the matrix is its own inverse."""
        return rotated(output, self._value_rotation)

    def centre(self, mean: Tensor) -> None:
        """Set the mean key, float[kv_heads, key_dim]. Before the first write: what is written stands."""
        if self._center is not None:
            self._center.copy_(rotated(mean.float(), self._key_rotation))

    def write(self, slots: slice | Tensor, key: Tensor, value: Tensor) -> None:
        """Keep key and value, [rows, kv_heads, dim], at `slots`."""
        if self._key_rotation is not None:
            key, value = rotated(key.float(), self._key_rotation), rotated(value.float(), self._value_rotation)
        if self._center is not None:
            key = key - self._center
        for plane, rows in zip(self.planes, self.kind.key.encode(key) + self.kind.value.encode(value), strict=True):
            plane[slots] = rows

    def read(self, span: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at `span`, [n, kv_heads, dim], rotated if `rotated`."""
        rows = [plane[span] for plane in self.planes]
        if self._center is None:
            key = self.kind.key.decode(rows[: self._keys], self.dtype)
        else:
            key = (self.kind.key.decode(rows[: self._keys], torch.float32) + self._center).to(self.dtype)
        return key, self.kind.value.decode(rows[self._keys :], self.dtype)

    def read_plain(self, span: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at `span` as the model made them, up to rounding."""
        key, value = self.read(span)
        return rotated(key, self._key_rotation), rotated(value, self._value_rotation)


NATIVE = KVFormat("native", _AsIs(), _AsIs())
_INT8, _FP8 = _Scaled(torch.int8), _Scaled(torch.float8_e4m3fn)
KVFormatFactory: TypeAlias = Callable[[], KVFormat]

_BUILT_IN = (
    NATIVE,
    KVFormat("int8", _INT8, _INT8),
    KVFormat("k8v4", _INT8, _FourBit(), rotated=True),
    KVFormat("int4", _FourBit(), _FourBit(), rotated=True, centred=True),
    KVFormat("fp8", _FP8, _FP8),
)
FORMATS: Mapping[str, KVFormatFactory] = {kind.name: partial(replace, kind) for kind in _BUILT_IN}
