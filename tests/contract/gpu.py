"""The GPU backends."""

from __future__ import annotations

from dataclasses import replace

from tests.contract.reliance import Contract, On

_BACKEND = "vllm.v1.attention.backend"
_FLASH = "vllm.v1.attention.backends.flash_attn"
_TRITON = "vllm.v1.attention.backends.triton_attn"
_SPEC = "vllm.v1.kv_cache_interface"
_INIT = "__init__(self, kv_cache_spec, layer_names, vllm_config, device)"
_BUILD = "build(self, common_prefix_len, common_attn_metadata, fast_build=False)"
_FORWARD = (
    "forward(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, "
    "output_block_scale=None)"
)
_IMPL = On(
    "",
    "our base class",
    bases=("AttentionImpl",),
    attributes=(
        "scale",
        "num_kv_heads",
        "head_size",
        "sliding_window",
        "alibi_slopes",
        "logits_soft_cap",
        "sinks",
    ),
    called=(
        "__init__(num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, "
        "logits_soft_cap, attn_type, kv_sharing_target_layer_name, sinks=...)",
    ),
    declared=(_FORWARD,),
)
_BUILDER = On(
    "",
    "the builder of dense rows",
    bases=("AttentionMetadataBuilder",),
    called=("build(common_prefix_len, common_attn_metadata, fast_build)",),
    declared=(_INIT, _BUILD),
)
_DENSE = (
    "num_actual_tokens",
    "max_query_len",
    "query_start_loc",
    "max_seq_len",
    "seq_lens",
    "block_table",
    "slot_mapping",
    "causal",
)

_GPU = (
    On(
        f"{_SPEC}.KVCacheLayout",
        "the tokens of one (block, KV head) are one contiguous run",
        members=("LBHNC = (0, 1, 2, 3, 4)", "BLHNC = (1, 0, 2, 3, 4)"),
    ),
    On(
        f"{_BACKEND}.MultipleOf",
        "block sizes of the dense kernels",
        fields=("base",),
        called=("MultipleOf(base)",),
    ),
    On(
        f"{_BACKEND}.AttentionBackend",
        "what we answer",
        attributes=("forward_includes_kv_cache_update", "supported_dtypes"),
        declared=(
            "@classmethod supports_head_size(cls, head_size)",
            "@staticmethod get_supported_kernel_block_sizes(kv_cache_spec=None)",
            "@classmethod supported_kv_cache_layouts(cls)",
            "@classmethod get_preferred_block_size(cls, default_block_size)",
        ),
    ),
    On("vllm.config.VllmConfig", "a type only"),
    On(f"{_SPEC}.AttentionSpec", "a type only"),
    On(
        f"{_BACKEND}.AttentionCGSupport",
        "what a captured step may hold",
        members=("ALWAYS = 3", "UNIFORM_BATCH = 2", "UNIFORM_SINGLE_TOKEN_DECODE = 1", "NEVER = 0"),
    ),
    On(
        f"{_BACKEND}.CommonAttentionMetadata",
        "which requests decode, and their contexts",
        attributes=(
            "query_start_loc_cpu: torch.Tensor",
            "seq_lens: torch.Tensor",
            "seq_lens_cpu_upper_bound: torch.Tensor | None",
            "block_table_tensor: torch.Tensor",
            "num_reqs: int",
        ),
    ),
    On(
        "vllm.v1.attention.backends.utils.split_decodes_and_prefills",
        "decoding requests come first in a batch",
        called=("split_decodes_and_prefills(common_attn_metadata, decode_threshold)",),
        code=("return (num_decodes, num_prefills, num_decode_tokens, num_prefill_tokens)",),
    ),
    On(
        f"{_BACKEND}.AttentionMetadataBuilder",
        "CUDA graphs, the order of the batch, drafts",
        attributes=(
            "_cudagraph_support",
            "reorder_batch_threshold",
            "supports_update_block_table",
            "supports_draft_decode_metadata_update",
        ),
        called=("_init_reorder_batch_threshold(reorder_batch_threshold, supports_spec_as_decode=...)",),
        declared=(_INIT, "@classmethod get_cudagraph_support(cls, vllm_config, kv_cache_spec)"),
    ),
    On(
        "vllm.v1.worker.gpu.attn_utils.get_attn_cg_support",
        "how a builder is asked",
        code=("builder.get_cudagraph_support(vllm_config, group.kv_cache_spec)",),
    ),
)

_CUDA = (
    On(
        f"{_BACKEND}.AttentionBackend",
        "our classes",
        declared=("@staticmethod get_impl_cls()", "@staticmethod get_builder_cls()"),
    ),
    On(
        f"{_FLASH}.FlashAttentionBackend",
        "our base class",
        bases=("AttentionBackend",),
        declared=(
            "@staticmethod get_impl_cls()",
            "@staticmethod get_builder_cls()",
            "@classmethod get_supported_kernel_block_sizes(cls, kv_cache_spec=None)",
            "@classmethod get_preferred_block_size(cls, default_block_size)",
            "@classmethod supports_compute_capability(cls, capability)",
        ),
    ),
    replace(_IMPL, name=f"{_FLASH}.FlashAttentionImpl"),
    replace(_BUILDER, name=f"{_FLASH}.FlashAttentionMetadataBuilder"),
    On(
        f"{_FLASH}._get_sliding_window_configs",
        "which layers the builder of dense rows looks at",
        code=("isinstance(impl, FlashAttentionImpl)",),
    ),
    On(
        f"{_FLASH}.FlashAttentionMetadataBuilder.__init__",
        "4-bit pages: prefill is scheduled for the buffer's dtype",
        code=("self.kv_cache_dtype = kv_cache_spec.dtype",),
    ),
    On(f"{_FLASH}.FlashAttentionMetadata", "prefill rows and dense layers", fields=_DENSE),
    On(
        f"{_FLASH}.FlashAttentionImpl.forward",
        "K beside V per token, by any strides",
        code=("kv_cache.transpose(1, 2).split(self.head_size, dim=-1)",),
    ),
    On(
        f"{_FLASH}.FlashAttentionImpl.do_kv_cache_update",
        "K beside V per token, by any strides",
        code=("kv_cache.transpose(1, 2).split(self.head_size, dim=-1)",),
    ),
    On(
        "vllm.platforms.cuda.CudaPlatformBase.get_attn_backend_cls",
        "CUDA asks a selected backend by itself",
        code=(
            "backend_class.validate_configuration(device_capability=device_capability, "
            "**attn_selector_config._asdict())",
        ),
    ),
)

_ROCM = (
    On(
        f"{_BACKEND}.AttentionBackend",
        "our classes",
        declared=("@staticmethod get_impl_cls()", "@staticmethod get_builder_cls()"),
    ),
    On(
        f"{_TRITON}.TritonAttentionBackend",
        "our base class",
        bases=("AttentionBackend",),
        declared=("@staticmethod get_impl_cls()", "@staticmethod get_builder_cls()"),
    ),
    replace(_IMPL, name=f"{_TRITON}.TritonAttentionImpl"),
    replace(_BUILDER, name=f"{_TRITON}.TritonAttentionMetadataBuilder"),
    On(f"{_TRITON}.TritonAttentionMetadata", "prefill rows and dense layers", fields=_DENSE),
    On(
        f"{_TRITON}.TritonAttentionImpl.forward",
        "K beside V per token, by any strides",
        code=("kv_cache = kv_cache.transpose(1, 2)", "key_cache, value_cache = kv_cache.split(hs, dim=-1)"),
    ),
    On(
        f"{_TRITON}.TritonAttentionImpl.do_kv_cache_update",
        "K beside V per token, by any strides",
        code=("kv_cache.transpose(1, 2).split(self.head_size, dim=-1)",),
    ),
)

GPU: Contract = {
    "vllm_quest/backend/gpu.py": _GPU,
    "vllm_quest/backend/cuda.py": _CUDA,
    "vllm_quest/backend/rocm.py": _ROCM,
}
