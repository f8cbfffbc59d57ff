"""What a format keeps of a token: how near, in how many bytes, and that no neighbour has a say in it."""

from __future__ import annotations

import pytest
import torch

from specgen.errors import UnsupportedModel
from specgen.kv.formats import FORMATS, KVFormat, LayerShape, LayerStore, hadamard

SMOLLM = LayerShape(3, 64, 64)
# Bytes of one token in one such layer in bfloat16: codes, and two bytes for each scale and each lowest value.
BYTES = {
    "native": 2 * 3 * 64 * 2,
    "int8": 2 * 3 * (64 + 2),
    "k8v4": 3 * (64 + 2) + 3 * (32 + 4),
    "int4": 2 * 3 * (32 + 4),
    "fp8": 2 * 3 * (64 + 2),
}
MOST_OF_NATIVE = {"int8": 0.53, "k8v4": 0.42, "int4": 0.31, "fp8": 0.53}
# The largest error over the largest number, for normal noise in vectors of 64.
NEAR = {"native": (0.0, 0.0), "int8": (0.005, 0.005), "k8v4": (0.01, 0.12), "int4": (0.12, 0.12), "fp8": (0.07, 0.07)}


def store(
    kind: KVFormat, shape: LayerShape = SMOLLM, dtype: torch.dtype = torch.float32, slots: int = 64
) -> LayerStore:
    planes = [torch.zeros(slots, *plane.shape, dtype=plane.dtype) for plane in kind.planes(shape, dtype)]
    return LayerStore(kind, shape, dtype, planes)


def noise(rows: int, shape: LayerShape = SMOLLM, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, shape.kv_heads, shape.key_dim, generator=generator),
        torch.randn(rows, shape.kv_heads, shape.value_dim, generator=generator),
    )


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_per_token(name: str) -> None:
    kind = FORMATS[name]()
    assert kind.bytes_per_token([SMOLLM] * 30, torch.bfloat16) == 30 * BYTES[name]
    assert name == "native" or BYTES[name] <= MOST_OF_NATIVE[name] * BYTES["native"]


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_read_is_near_what_was_written(name: str) -> None:
    layer = store(FORMATS[name]())
    written = noise(40)
    layer.write(slice(3, 43), *written)
    for read, true, near in zip(layer.read_plain(slice(3, 43)), written, NEAR[name], strict=True):
        assert (read - true).abs().max() <= near * true.abs().max()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_kept_of_a_token_does_not_depend_on_its_neighbours(name: str, dtype: torch.dtype) -> None:
    together, alone = store(FORMATS[name](), dtype=dtype), store(FORMATS[name](), dtype=dtype)
    key, value = (side.to(dtype) for side in noise(40))
    together.write(slice(0, 40), key, value)
    for row in range(40):
        alone.write(torch.tensor([row]), key[row : row + 1], value[row : row + 1])
    assert all(torch.equal(a, b) for a, b in zip(together.planes, alone.planes, strict=True))
    for both, one in zip(together.read(slice(0, 40)), alone.read(torch.arange(40)), strict=True):
        assert torch.equal(both, one)


@pytest.mark.parametrize("name", FORMATS)
def test_scores_and_outputs_are_kept(name: str) -> None:
    """Turned queries over turned keys, and the output turned back, say what plain ones say."""
    layer = store(FORMATS[name]())
    layer.write(slice(0, 40), *noise(40))
    query = noise(5, seed=1)[0]
    key, value = layer.read(slice(0, 40))
    plain_key, plain_value = layer.read_plain(slice(0, 40))
    turned = layer.rotate_query(query) if layer.rotated else query
    scores = torch.einsum("qhd,khd->hqk", turned, key)
    torch.testing.assert_close(scores, torch.einsum("qhd,khd->hqk", query, plain_key), rtol=1e-4, atol=1e-4)
    output = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
    output = layer.rotate_output(output) if layer.rotated else output
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), plain_value)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dim", [1, 2, 12, 64, 80, 96, 128])
def test_the_hadamard_matrix_is_its_own_inverse(dim: int) -> None:
    matrix = hadamard(dim).double()
    torch.testing.assert_close(matrix @ matrix, torch.eye(dim).double(), rtol=0, atol=1e-6)
    assert torch.equal(matrix, matrix.T)


@pytest.mark.parametrize("heads", [1, 2, 4, 9])
@pytest.mark.parametrize("dim", [8, 16, 64])
def test_a_turned_head_has_the_same_bits_however_it_lies_in_memory(heads: int, dim: int) -> None:
    shape = LayerShape(heads, dim, dim)
    layer = store(FORMATS["int4"](), shape)
    rows = noise(40, shape)[0]
    strided = rows.transpose(0, 1).contiguous().transpose(0, 1)
    expected = layer.rotate_output(rows)
    assert torch.equal(layer.rotate_output(strided), expected)
    for row in (0, 7, 39):
        assert torch.equal(layer.rotate_output(rows[row : row + 1]), expected[row : row + 1])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dims", [(12, 12), (80, 96), (24, 12), (256, 256)])
def test_heads_of_any_even_size(name: str, dims: tuple[int, int]) -> None:
    shape = LayerShape(2, *dims)
    layer = store(FORMATS[name](), shape)
    written = noise(20, shape)
    layer.write(slice(0, 20), *written)
    for read, true in zip(layer.read_plain(slice(0, 20)), written, strict=True):
        assert (read - true).norm() <= 0.15 * true.norm()


@pytest.mark.parametrize("name", ["k8v4", "int4"])
def test_four_bits_need_an_even_head(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="KV heads of 7 numbers cannot be kept in 4 bits; choose int8 or fp8"):
        FORMATS[name]().planes(LayerShape(2, 7, 7), torch.float32)


def test_a_centre_helps_keys_that_lie_away_from_zero() -> None:
    kind = FORMATS["int4"]()
    mean = 20 * torch.randn(3, 64, generator=torch.Generator().manual_seed(5))
    key, value = noise(40)
    errors = []
    for centre in (torch.zeros_like(mean), mean):
        layer = store(kind)
        layer.centre(centre)
        layer.write(slice(0, 40), key + mean, value)
        errors.append(float((layer.read_plain(slice(0, 40))[0] - key - mean).abs().max()))
    assert errors[1] < errors[0] / 5


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [0.0, 1e-6, 1e4])
def test_tiny_huge_and_zero_vectors_stay_finite(name: str, size: float) -> None:
    layer = store(FORMATS[name]())
    written = tuple(side * size for side in noise(8))
    layer.write(slice(0, 8), *written)
    for read, true in zip(layer.read_plain(slice(0, 8)), written, strict=True):
        assert torch.isfinite(read).all()
        assert (read - true).abs().max() <= max(0.2 * float(true.abs().max()), 1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_only_the_native_format_is_lossless(name: str) -> None:
    assert FORMATS[name]().lossless == (name == "native")
