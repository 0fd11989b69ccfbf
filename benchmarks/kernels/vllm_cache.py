"""A layer's KV cache as vLLM lays it out for one of its backends, for kernels that run without an engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from benchmarks.kernels.steps import Rows

Layer = Any  # a kernel's own: the cache, and what it keeps with it


@dataclass(frozen=True)
class DenseKernel:
    """What one of vLLM's backends does in a layer.

    Attributes:
        new_layer: Allocates the cache of one layer.
        store: Writes tokens: ``(layer, key [T, H, D], value [T, H, D], slot_mapping [T])``.
        attend: Writes the rows' output by the layer's cache.
    """

    new_layer: Callable[[], Layer]
    store: Callable[[Layer, torch.Tensor, torch.Tensor, torch.Tensor], object]
    attend: Callable[[Layer], object]


def new_cache(rows: Rows, backend: Any, cache_dtype: str = "auto") -> torch.Tensor:
    """An empty cache ``[B, H, N, C]``, its strides those of a model in which all layers have this backend.

    Args:
        rows: Number and size of the blocks, heads, and the model's dtype.
        backend: vLLM's backend class: it says what a token's C elements are, and the order in memory.
        cache_dtype: vLLM's ``--kv-cache-dtype``.
    """
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        compute_layer_kv_cache_shape_bytes,
        compute_layout_strides,
        get_kv_quant_mode,
    )

    spec = FullAttentionSpec(
        block_size=rows.block_size,
        num_kv_heads=rows.geometry.num_kv_heads,
        head_size=rows.geometry.head_size,
        dtype=rows.key.dtype if cache_dtype == "auto" else STR_DTYPE_TO_TORCH_DTYPE[cache_dtype],
        kv_quant_mode=get_kv_quant_mode(cache_dtype),
    )
    spec = backend.customize_spec(spec)
    layout = get_supported_kv_cache_layouts([backend])[0]
    shape = compute_layer_kv_cache_shape_bytes(spec, rows.num_blocks)
    strides = compute_layout_strides(spec, rows.num_blocks, 1, layout)[1:]
    raw = torch.zeros(math.prod(shape), dtype=torch.int8, device=rows.device)
    return raw.as_strided(shape, strides).view(spec.dtype)
