"""Blocks in the model's dtype, as prefill reads them: the reference's."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.conformance import EVERY_DEVICE, LINES, QUIET, case_of
from tests.kernels.interpreter import TOLERANCE

pytestmark = QUIET


@EVERY_DEVICE
@pytest.mark.parametrize("line", [line for line in LINES if not line.is_dense], ids=str)
def test_dequantized_blocks_are_the_references(device, line) -> None:
    """Whole blocks, parts of them, one of which nothing is wanted; a block behind them is not written."""
    cache, *_ = case_of(line, device)
    context, size = cache.requests[0], line.block_size
    blocks = torch.tensor(context.blocks, dtype=torch.int32)
    wanted = (len(context.keys) - torch.arange(len(blocks)) * size).clamp(0, size).int()
    wanted[2], wanted[3] = 0, size // 2 - 1
    actual = cache.kernels.dequantize_blocks(blocks, wanted)
    expected = cache.reference.dequantize_blocks(blocks, wanted)
    dtype, triton, on_gpu = cache.layout.block.dtype, device == "triton", cache.kernels.where.type != "cpu"
    # To bfloat16 the interpreter rounds its own way. A GPU fuses product and sum: float32 rounds once less,
    # at the size of the zero point, here up to 4.
    bound = TOLERANCE[dtype] if triton and (on_gpu or dtype == torch.bfloat16) else 0
    torch.testing.assert_close(actual, expected, rtol=bound, atol=2**-21 if on_gpu else 0, equal_nan=True)
    for part in actual:
        assert part[:-1].isfinite().all()
        assert part[-1].isnan().all()
