"""vLLM's dense decode kernels on a GPU, as `benchmarks.kernels.gpu` times them.

Each factory takes what a step is given and returns a `DenseKernel`. What must be planned on the host is
planned there, before the graph is captured. Kernels over the model's dtype differ in their attention only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import triton

from benchmarks.kernels.peers import PEERS
from benchmarks.kernels.vllm_cache import DenseKernel, Layer, new_cache

if TYPE_CHECKING:
    from benchmarks.kernels.steps import Rows

Attend = Callable[[torch.Tensor, torch.Tensor], object]  # of K and V as ``[B, N, H, D]``, strided

FLASHINFER_WORKSPACE = 1 << 28  # bytes


def _arguments(rows: Rows) -> dict[str, Any]:
    """What vLLM's two kernels call by the same names."""
    return {
        "q": rows.query,
        "out": rows.out,
        "cu_seqlens_q": rows.starts,
        "max_seqlen_q": 1,
        "seqused_k": rows.seq_lens,
        "max_seqlen_k": rows.context,
        "softmax_scale": rows.scale,
        "causal": True,
        "block_table": rows.block_table,
    }


def flash_attn(rows: Rows) -> Attend:
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    version = get_flash_attn_version(head_size=rows.query.shape[2])

    def attend(key_cache: torch.Tensor, value_cache: torch.Tensor) -> object:
        return flash_attn_varlen_func(
            k=key_cache,
            v=value_cache,
            **_arguments(rows),
            fa_version=version,
        )

    return attend


def triton_attn(rows: Rows) -> Attend:
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    segments, (batch, heads, head_size) = 16, rows.query.shape
    maxima, sums = (torch.empty(batch, heads, segments, device="cuda") for _ in range(2))
    partial = torch.empty(batch, heads, segments, triton.next_power_of_2(head_size), device="cuda")

    def attend(key_cache: torch.Tensor, value_cache: torch.Tensor) -> object:
        return unified_attention(
            k=key_cache,
            v=value_cache,
            **_arguments(rows),
            window_size=(-1, -1),
            softcap=0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            seq_threshold_3D=128 // key_cache.shape[2],
            num_par_softmax_segments=segments,
            softmax_segm_output=partial,
            softmax_segm_max=maxima,
            softmax_segm_expsum=sums,
        )

    return attend


def flashinfer(rows: Rows) -> Attend:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    batch, block_size = len(rows.query), rows.block_size
    blocks = -(-rows.context // block_size)
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * blocks
    last = torch.full((batch,), (rows.context - 1) % block_size + 1, dtype=torch.int32, device="cuda")
    indices = rows.block_table[:, :blocks].flatten()
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(FLASHINFER_WORKSPACE, dtype=torch.uint8, device="cuda"),
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=torch.empty_like(starts),
        paged_kv_indices_buffer=torch.empty_like(indices),
        paged_kv_last_page_len_buffer=torch.empty_like(last),
    )
    wrapper.plan(
        starts,
        indices,
        last,
        num_qo_heads=rows.query.shape[1],
        num_kv_heads=rows.key.shape[1],
        head_dim=rows.query.shape[2],
        page_size=block_size,
        q_data_type=rows.query.dtype,
        kv_data_type=rows.key.dtype,
        sm_scale=rows.scale,
    )

    def attend(key_cache: torch.Tensor, value_cache: torch.Tensor) -> object:
        return wrapper.run(rows.query, (key_cache, value_cache), out=rows.out)

    return attend


def _in_model_dtype(attention: Callable[[Rows], Attend]) -> Callable[[Rows], DenseKernel]:
    """A kernel over K and V as they are, of each token and head one after the other."""

    def factory(rows: Rows) -> DenseKernel:
        from vllm.v1.attention.backends.fa_utils import reshape_and_cache_flash
        from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

        attend, one = attention(rows), torch.ones((), device=rows.device)

        def new_layer() -> tuple[torch.Tensor, ...]:  # the three backends ask for the same layout
            cache = new_cache(rows, TritonAttentionBackend)
            return cache.transpose(1, 2).split(rows.geometry.head_size, dim=-1)

        def store(layer: Layer, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
            reshape_and_cache_flash(key, value, *layer, slots, "auto", one, one)

        return DenseKernel(new_layer, store, lambda layer: attend(*layer))

    return factory


DENSE: dict[str, Callable[[Rows], DenseKernel]] = {
    "FLASH_ATTN": _in_model_dtype(flash_attn),
    "TRITON_ATTN": _in_model_dtype(triton_attn),
    "FLASHINFER": _in_model_dtype(flashinfer),
    **PEERS,
}
