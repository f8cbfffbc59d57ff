"""A KV format that does not keep what it says is refused by name when a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from specgen.errors import UnsupportedModel
from specgen.kv.formats import FORMATS, NATIVE, Coder, KVFormat, LayerShape, Plane
from specgen.model.checks.kv_format import check_kv_format
from specgen.model.runner import load_runner
from tests.support.tiny import build

SHAPES = (LayerShape(2, 16, 8), LayerShape(1, 32, 32))


class Odd(Coder):
    """Declares what it does not make, decodes to another shape, or fails."""

    def __init__(self, how: str) -> None:
        self.how = how

    def planes(self, heads: int, dim: int, dtype: torch.dtype) -> tuple[Plane, ...]:
        return (Plane((heads, dim), torch.int8 if self.how == "type" else dtype),)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.how == "fails":
            raise ZeroDivisionError("no scale")
        return (x[..., :-1],) if self.how == "shape" else (x,)

    def decode(self, planes: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return planes[0].double() if self.how == "decoded" else planes[0]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_own_keep_what_they_say(name: str, dtype: torch.dtype) -> None:
    check_kv_format(FORMATS[name](), SHAPES, dtype)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shape", r"its key coder makes planes float32 \[3, 2, 15\], and declares float32 \[3, 2, 16\]"),
        ("type", r"makes planes float32 .*, and declares int8"),
        ("decoded", r"decodes to float64 \[3, 2, 16\], it must be float32"),
        ("fails", r"fails on heads of 16 numbers \(ZeroDivisionError: no scale\)"),
    ],
)
def test_what_does_not_is_refused_by_name(how: str, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=rf"kv_format 'odd': .*{message}"):
        check_kv_format(KVFormat("odd", Odd(how), NATIVE.value), SHAPES, torch.float32)


def test_loading_checks() -> None:
    odd = replace(NATIVE, name="odd", value=Odd("shape"))
    with pytest.raises(UnsupportedModel, match="kv_format 'odd': its value coder makes planes"):
        load_runner(build("llama"), kv_tokens=64, kv_format=odd)
