"""The proof, at load, that a KV format keeps what it says: a plugin's may be anything."""

from __future__ import annotations

import torch
from torch import Tensor

from specgen.errors import UnsupportedModel
from specgen.kv.formats import Coder, KVFormat, LayerShape

_ROWS = 3


def check_kv_format(kind: KVFormat, shapes: tuple[LayerShape, ...], dtype: torch.dtype) -> None:
    """Raise UnsupportedModel naming the format and the side whose planes are not those that it declares."""
    for shape in dict.fromkeys(shapes):
        for side, coder, dim in (("key", kind.key, shape.key_dim), ("value", kind.value, shape.value_dim)):
            if fault := _fault(coder, torch.zeros(_ROWS, shape.kv_heads, dim, dtype=dtype)):
                raise UnsupportedModel(f"kv_format {kind.name!r}: its {side} coder {fault}; take another format")


def _fault(coder: Coder, x: Tensor) -> str | None:
    planes = coder.planes(x.shape[1], x.shape[2], x.dtype)
    try:
        coded = coder.encode(x)
        decoded = coder.decode(coded, x.dtype)
    except UnsupportedModel:
        raise
    except Exception as error:  # somebody else's code
        return f"fails on heads of {x.shape[2]} numbers ({type(error).__name__}: {error})"
    wanted = [(torch.Size((len(x), *plane.shape)), plane.dtype) for plane in planes]
    found = [(plane.shape, plane.dtype) for plane in coded]
    if found != wanted:
        return f"makes planes {_said(found)}, and declares {_said(wanted)}"
    if decoded.shape != x.shape or decoded.dtype != x.dtype:
        return f"decodes to {_said([(decoded.shape, decoded.dtype)])}, it must be {_said([(x.shape, x.dtype)])}"
    return None


def _said(planes: list[tuple[torch.Size, torch.dtype]]) -> str:
    return ", ".join(f"{dtype} {list(shape)}" for shape, dtype in planes).replace("torch.", "")
