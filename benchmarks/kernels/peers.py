"""vLLM's own 4-bit caches: a decode step as their backends do it, without an engine.

Named as vLLM's ``--kv-cache-dtype``. Rotations of K, q and the output are part of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import triton

from benchmarks.kernels.vllm_cache import DenseKernel, new_cache

if TYPE_CHECKING:
    from benchmarks.kernels.steps import Rows


def int4_per_token_head(rows: Rows) -> DenseKernel:
    """TRITON_ATTN's implementation itself, one per layer: it keeps views of the layer's scales."""
    from vllm.v1.attention.backends import triton_attn

    kind, geometry = "int4_per_token_head", rows.geometry
    segments, module = triton_attn.NUM_PAR_SOFTMAX_SEGMENTS, torch.nn.Module()
    sums, maxima = (
        torch.empty(len(rows.query), geometry.num_heads, segments, device=rows.device) for _ in range(2)
    )
    metadata = triton_attn.TritonAttentionMetadata(
        num_actual_tokens=len(rows.query),
        max_query_len=1,
        query_start_loc=rows.starts,
        max_seq_len=rows.context,
        seq_lens=rows.seq_lens,
        block_table=rows.block_table,
        slot_mapping=rows.slot_mapping,
        # With CUDA graphs vLLM takes the nearest size that it captures; these powers of two are among them.
        seq_threshold_3D=triton_attn.MIN_LAUNCH_GRID_SIZE_2D // geometry.num_kv_heads,
        num_par_softmax_segments=segments,
        softmax_segm_output=torch.empty(
            *sums.shape, triton.next_power_of_2(geometry.head_size), device=rows.device
        ),
        softmax_segm_max=maxima,
        softmax_segm_expsum=sums,
        causal=True,
    )

    def new_layer() -> Any:
        implementation = triton_attn.TritonAttentionImpl(
            geometry.num_heads, geometry.head_size, rows.scale, geometry.num_kv_heads, None, None, kind
        )
        return implementation, new_cache(rows, triton_attn.TritonAttentionBackend, kind)

    def store(layer: Any, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        implementation, cache = layer
        implementation.do_kv_cache_update(module, key, value, cache, slots)

    def attend(layer: Any) -> None:
        implementation, cache = layer
        implementation.forward(module, rows.query, rows.key, rows.value, cache, metadata, rows.out)

    return DenseKernel(new_layer, store, attend)


def turboquant_4bit_nc(rows: Rows) -> DenseKernel:
    """TURBOQUANT's operations as its implementation calls them, which itself needs an engine's settings."""
    from vllm.config.attention import AttentionConfig
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
    from vllm.v1.attention.backends.turboquant_attn import TurboQuantAttentionBackend, _build_hadamard
    from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention
    from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

    kind, (batch, heads, head_size) = "turboquant_4bit_nc", rows.query.shape
    config = TurboQuantConfig.from_cache_dtype(kind, head_size)
    format_arguments = {
        "mse_bits": config.key_mse_bits,
        "key_packed_size": config.key_packed_size,
        "value_quant_bits": config.effective_value_quant_bits,
        "key_fp8": config.key_fp8,
    }
    hadamard = _build_hadamard(head_size, rows.device)
    centroids = get_centroids(head_size, config.centroid_bits).to(rows.device, torch.float32)
    ascending = centroids.sort().values
    midpoints = (ascending[:-1] + ascending[1:]) / 2
    splits = AttentionConfig().tq_max_kv_splits_for_cuda_graph
    partial = torch.empty(batch, heads, splits, head_size + 1, device=rows.device)
    attended = torch.empty_like(rows.query)
    log_sums = torch.empty(batch, heads, device=rows.device)

    def new_layer() -> torch.Tensor:
        return new_cache(rows, TurboQuantAttentionBackend, kind).transpose(1, 2)

    def store(layer: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        triton_turboquant_store(key, value, layer, slots, hadamard, midpoints, **format_arguments)

    def attend(layer: torch.Tensor) -> None:
        found = triton_turboquant_decode_attention(
            query=rows.query,
            kv_cache=layer,
            block_table=rows.block_table,
            seq_lens=rows.seq_lens,
            Pi=hadamard,
            centroids=centroids,
            scale=rows.scale,
            **format_arguments,
            norm_correction=config.norm_correction,
            PiT=hadamard,
            mid_o_buf=partial,
            output_buf=attended,
            lse_buf=log_sums,
            max_num_kv_splits=splits,
        )
        rows.out.copy_(found)  # as the implementation does

    return DenseKernel(new_layer, store, attend)


PEERS: dict[str, Callable[[Rows], DenseKernel]] = {
    "int4_per_token_head": int4_per_token_head,
    "turboquant_4bit_nc": turboquant_4bit_nc,
}
