"""The FP8 quantiser against a loop over blocks, and its promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.weights.quantize import ACTIVATION_BLOCKS, E4M3_MAX, WEIGHT_BLOCKS, Blocks, dequantize, quantize, round_to_fp8

# All non-negative finite e4m3 numbers: 4 exponent bits (bias 7), 3 mantissa bits, no infinity, 0x7f is NaN.
E4M3 = np.array([(m / 8 if e == 0 else 1 + m / 8) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8)][:-1])


def slow_round(matrix: np.ndarray, blocks: Blocks) -> np.ndarray:
    """Block by block, number by number, to the nearest e4m3 (ties to even mantissa)."""
    result = np.empty_like(matrix)
    rows, columns = blocks.rows or matrix.shape[0], blocks.columns or matrix.shape[1]
    for top in range(0, matrix.shape[0], rows):
        for left in range(0, matrix.shape[1], columns):
            block = matrix[top : top + rows, left : left + columns].astype(np.float64)
            scale = np.float32(np.abs(block).max()) / np.float32(E4M3_MAX)
            if blocks.power_of_two and scale > 0:
                scale = np.float32(2.0 ** np.ceil(np.log2(scale)))
            scale = scale if scale > 0 else np.float32(1)
            for (i, j), x in np.ndenumerate(block):
                scaled = min(float(np.float32(x) / scale) if x > 0 else -float(np.float32(x) / scale), E4M3_MAX)
                distance = np.abs(E4M3 - scaled)
                nearest = np.flatnonzero(distance == distance.min())
                code = next((c for c in nearest if c % 2 == 0), nearest[0])
                result[top + i, left + j] = np.sign(x) * np.float32(E4M3[code]) * scale
    return result


@pytest.mark.parametrize("kind", ["activation", "weight"])
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_equals_slow_reference(recipe: str, kind: str) -> None:
    blocks = (ACTIVATION_BLOCKS if kind == "activation" else WEIGHT_BLOCKS)[recipe]  # type: ignore[index]
    generator = np.random.default_rng(0)
    matrix = (generator.standard_normal((131, 150)) * np.exp(generator.normal(size=(131, 1)) * 3)).astype(np.float32)
    matrix[3] = 0.0
    ours = round_to_fp8(torch.from_numpy(matrix), blocks).numpy()
    np.testing.assert_allclose(ours, slow_round(matrix, blocks), rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 5),
    st.integers(1, 300),
    st.sampled_from([*ACTIVATION_BLOCKS.values(), *WEIGHT_BLOCKS.values()]),
    st.floats(-30, 30),
)
def test_error_is_bounded_and_rounding_twice_is_rounding_once(
    rows: int, columns: int, blocks: Blocks, magnitude: float
) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns)) * 2.0**magnitude
    once = round_to_fp8(x, blocks)
    assert once.shape == x.shape
    if rows:
        values, scales = quantize(x, blocks)
        spread = scales.repeat_interleave(blocks.rows or rows, 0)[:rows]
        spread = spread.repeat_interleave(blocks.columns or columns, 1)[:, :columns]
        # Half a step: 2^-4 of the number, or of the smallest step where numbers are subnormal.
        bound = torch.maximum(x.abs() * 2**-4, spread * 2.0**-10) * (1 + 1e-5)
        assert ((once - x).abs() <= bound).all()
        assert torch.equal(dequantize(values, scales, blocks), once)
    torch.testing.assert_close(round_to_fp8(once, blocks), once, rtol=1e-6, atol=0)


def test_other_shapes() -> None:
    x = torch.randn(3, 5, 64)
    flat = round_to_fp8(x.flatten(0, 1), ACTIVATION_BLOCKS["blockwise"])
    assert torch.equal(round_to_fp8(x, ACTIVATION_BLOCKS["blockwise"]).flatten(0, 1), flat)
    with pytest.raises(ValueError, match="matrix"):
        quantize(x, ACTIVATION_BLOCKS["blockwise"])
