"""The CPU kernel for linear layers: near float64, the same bits for a row in any company, and really in use."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from specgen.kernels.cpu_backend import why_not
from specgen.model.packed_linear import PackedLinear, linears_together, pack_linears
from specgen.model.runner import load_runner
from tests.support.tiny import build

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no CPU kernels: {why_not()}")

DTYPES = (torch.float32, torch.bfloat16)
# Whole tiles and panels, parts of them, less than one; more rows than are computed at once.
SIZES = ((64, 64), (576, 1536), (100, 70), (7, 5), (33, 96), (1, 1))
ROWS = (1, 2, 6, 7, 16, 17, 32, 33, 70)
EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}


def layer(outputs: int, inputs: int, dtype: torch.dtype, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)


def packed(*layers: nn.Linear) -> nn.Sequential:
    model = nn.Sequential(*layers)
    assert pack_linears(model) == len(layers)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_each_number_is_the_sum_of_its_products(size: tuple[int, int], dtype: torch.dtype, bias: bool) -> None:
    outputs, inputs = size
    plain = layer(outputs, inputs, dtype, bias=bias)
    exact = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)
    exact.load_state_dict(plain.state_dict())
    (ours,) = packed(plain)
    for rows in ROWS:
        x = torch.randn(rows, inputs).to(dtype)
        terms = x.double().abs() @ exact.weight.T.abs() + 1
        # One rounding of the result, and in float32 one of each step on the way.
        bound = terms * 2.0**-23 * inputs + exact(x.double()).abs() * EPSILON[dtype]
        assert ((ours(x).double() - exact(x.double())).abs() <= bound).all(), rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pack", [True, False])
def test_layers_together_say_what_each_says(dtype: torch.dtype, pack: bool) -> None:
    layers = [layer(outputs, 96, dtype, bias=outputs != 33, seed=outputs) for outputs in (64, 33, 100)]
    if pack:
        packed(*layers)
    x = torch.randn(2, 9, 96).to(dtype)
    together = linears_together(x, layers)
    assert all(torch.equal(rows, one(x)) for rows, one in zip(together, layers, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_a_row_has_the_same_bits_in_any_company(size: tuple[int, int], dtype: torch.dtype) -> None:
    outputs, inputs = size
    (ours,) = packed(layer(outputs, inputs, dtype))
    x = torch.randn(max(ROWS), inputs).to(dtype)
    alone = torch.cat([ours(row[None]) for row in x])
    for rows in ROWS:
        assert torch.equal(ours(x[:rows]), alone[:rows])
        assert torch.equal(ours(x[-rows:]), alone[-rows:])
    strided = torch.randn(inputs, 9).to(dtype).T
    assert torch.equal(ours(strided), ours(strided.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_that_read_the_same_rows_may_be_called_at_once(dtype: torch.dtype) -> None:
    layers = packed(layer(40, 48, dtype), layer(7, 48, dtype, bias=False, seed=1), layer(96, 48, dtype, seed=2))
    x = torch.randn(2, 5, 48).to(dtype)
    biases = [module.bias for module in layers]
    together = torch.ops.specgen.linear(x, [m.packed for m in layers], biases, [m.out_features for m in layers])
    assert torch.equal(together, torch.cat([module(x) for module in layers], dim=-1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_a_batch_are_sums_that_no_other_row_changes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for inputs, columns in SIZES:
        x, weight = torch.randn(3, 9, inputs).to(dtype), torch.randn(3, inputs, columns).to(dtype)
        found = torch.ops.specgen.bmm(x, weight)
        exact = x.double() @ weight.double()
        bound = (x.double().abs() @ weight.double().abs() + 1) * 2.0**-23 * inputs + exact.abs() * EPSILON[dtype]
        assert ((found.double() - exact).abs() <= bound).all()
        for rows in (range(1), range(5, 7), range(2, 9)):
            assert torch.equal(
                torch.ops.specgen.bmm(x[:, rows.start : rows.stop], weight), found[:, rows.start : rows.stop]
            )
        turned = weight.mT.contiguous().mT
        assert torch.equal(torch.ops.specgen.bmm(x, turned), found)


def test_no_rows_are_no_rows() -> None:
    (ours,) = packed(layer(8, 16, torch.float32))
    assert ours(torch.empty(0, 16)).shape == (0, 8)


def test_only_plain_layers_are_packed() -> None:
    class Own(nn.Linear):
        pass

    hooked, patched = layer(4, 4, torch.float32), layer(4, 4, torch.float32)
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    patched.forward = lambda x: x
    others = [Own(4, 4), layer(4, 4, torch.float64), layer(4, 4, torch.float16), hooked, patched]
    kinds = [type(module) for module in others]
    assert pack_linears(nn.Sequential(*others)) == 0
    assert [type(module) for module in others] == kinds


def test_a_target_uses_it_and_leaves_the_model_as_it_is() -> None:
    model = build("llama")
    target = load_runner(model, kv_tokens=64)
    assert all(isinstance(m, PackedLinear) for m in target.model.modules() if isinstance(m, nn.Linear))
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
    plain = load_runner(model, kv_tokens=64, cpu_kernels=False)
    assert not any(isinstance(m, PackedLinear) for m in plain.model.modules())
