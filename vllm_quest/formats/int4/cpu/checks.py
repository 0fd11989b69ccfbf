"""What kernels over 4-bit pages rely on."""

from __future__ import annotations

import torch

from vllm_quest.formats.int4 import Int4Keys, Int4Values

__all__ = ["check_int4"]


def check_int4(key_cache: Int4Keys, value_cache: Int4Values) -> tuple[int, ...]:
    """B, H, P, S / 2 and D, if K's pages are channel-major, V's token-major, and V's params contiguous."""
    codes, residual, _ = key_cache
    blocks, heads, pages, half, dim = codes.shape
    expected = {
        "key_cache": (codes, (blocks, heads, pages, half, dim), (half * dim, 1, half)),
        "key_cache.residual": (residual, (blocks, heads, half, dim), (1, half)),
        "value_cache": (value_cache.codes, (blocks, heads, pages, half, dim), (half * dim, dim, 1)),
        "value_cache.residual": (value_cache.residual, (blocks, heads, half, dim), (dim, 1)),
    }
    for name, (tensor, shape, strides) in expected.items():
        if tensor.dtype != torch.uint8 or tensor.shape != shape or tensor.stride()[2:] != strides or dim % 16:
            raise ValueError(
                f"{name}: expected {shape} torch.uint8 with strides (.., .., {strides}) and D a multiple "
                f"of 16, got {tuple(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}"
            )
    params, size = value_cache.params, 2 * half * pages
    groups = params.shape[3]
    if (
        params.dtype != torch.bfloat16
        or params.shape != (blocks, heads, size, groups, 2)
        or params.stride()[2:] != (groups * 2, 2, 1)
        or dim % groups
    ):
        raise ValueError(
            f"value_cache.params: expected [{blocks}, {heads}, {size}, G, 2] torch.bfloat16 with contiguous "
            f"[N, G, 2], got {tuple(params.shape)} {params.dtype} with strides {params.stride()}"
        )
    return blocks, heads, pages, half, dim
