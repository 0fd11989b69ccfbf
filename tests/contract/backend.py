"""What the backends of all devices share: refusals, which layers and rows are sparse, how vLLM calls us."""

from __future__ import annotations

from dataclasses import replace

from tests.contract.reliance import Contract, On

_BACKEND = "vllm.v1.attention.backend"
_BACKENDS = "vllm.v1.attention.backends"
_SPEC = "vllm.v1.kv_cache_interface"
_LAYER = "vllm.model_executor.layers.attention"
_FORWARD = (
    "forward(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, "
    "output_block_scale=None)"
)
_DENSE = On(
    "",
    "attends to dense rows, and stores their K and V in the prefill buffer",
    declared=(_FORWARD, "do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping)"),
    called=(
        "do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)",
        "forward(layer, query, key, value, kv_cache, attn_metadata, output)",
    ),
)

BACKEND: Contract = {
    "vllm_quest/backend/support.py": (
        On(
            f"{_BACKEND}.AttentionBackend.validate_configuration",
            "our reasons are attached to vLLM's wording",
            code=(
                "'MLA not supported'",
                "'kv_cache_dtype not supported'",
                "'attention sinks not supported'",
                "f'attention type {attn_type} not supported'",
            ),
        ),
        On(
            f"{_BACKEND}.AttentionType",
            "the same, and supports_attn_type",
            members=(
                "DECODER = 'decoder'",
                "ENCODER = 'encoder'",
                "ENCODER_ONLY = 'encoder_only'",
                "ENCODER_DECODER = 'encoder_decoder'",
            ),
        ),
    ),
    "vllm_quest/backend/layers.py": (
        On("vllm.logger.init_logger", "our lines go where vLLM's go", called=("init_logger(name)",)),
        On(
            "vllm.model_executor.models.utils.extract_layer_index",
            "which layers are the first dense_layers",
            called=("extract_layer_index(layer_name)",),
        ),
        On(f"{_LAYER}.Attention", "windows stay dense; None means no window", attributes=("sliding_window",)),
    ),
    "vllm_quest/backend/prefill.py": (
        On(
            "vllm.config.get_current_vllm_config",
            "the engine whose model is being built",
            called=("get_current_vllm_config()",),
        ),
        On("vllm.config.VllmConfig", attributes=("model_config: ModelConfig",)),
        On("vllm.config.ModelConfig", "the longest context", attributes=("max_model_len", "dtype")),
        On("vllm.platforms.current_platform", "where the model is built"),
        On("vllm.platforms.Platform", attributes=("device_type",)),
    ),
    "vllm_quest/backend/step.py": (
        On(
            f"{_BACKEND}.CommonAttentionMetadata",
            "one step; replace() makes the batch of the dense rows",
            attributes=(
                "query_start_loc: torch.Tensor",
                "query_start_loc_cpu: torch.Tensor",
                "seq_lens: torch.Tensor",
                "seq_lens_cpu_upper_bound: torch.Tensor | None",
                "block_table_tensor: torch.Tensor",
                "slot_mapping: torch.Tensor",
            ),
            fields=("num_reqs", "num_actual_tokens", "max_query_len", "max_seq_len", "causal"),
        ),
        On(f"{_BACKEND}.CommonAttentionMetadata.replace", "keeps the other fields"),
    ),
    "vllm_quest/backend/builder.py": (
        On("vllm.config.VllmConfig", attributes=("model_config: ModelConfig",)),
        On(
            "vllm.config.VllmConfig",
            "sizes of buffers",
            attributes=("scheduler_config: SchedulerConfig", "compilation_config: CompilationConfig"),
        ),
        On(
            "vllm.config.ModelConfig",
            "sizes of buffers, and of elements",
            attributes=("max_model_len", "dtype"),
        ),
        On("vllm.config.SchedulerConfig", "sizes of buffers", attributes=("max_num_seqs: int",)),
        On(
            "vllm.config.CompilationConfig",
            "sizes of buffers",
            attributes=("max_cudagraph_capture_size: int",),
        ),
        On(
            "vllm.config.get_layers_from_vllm_config",
            "the layers of a KV group",
            called=("get_layers_from_vllm_config(vllm_config, layer_type, layer_names)",),
        ),
        On(f"{_LAYER}.Attention", "the builder starts its impl", attributes=("impl", "num_heads")),
        On(
            f"{_BACKEND}.max_decode_query_len",
            "how many tokens a verification brings",
            called=("max_decode_query_len(vllm_config)",),
        ),
        On(
            f"{_BACKEND}.CommonAttentionMetadata",
            "one step",
            attributes=("query_start_loc_cpu: torch.Tensor", "seq_lens", "block_table_tensor: torch.Tensor"),
        ),
        On(
            f"{_SPEC}.AttentionSpec",
            "the group's cache",
            attributes=("num_kv_heads: int", "dtype: torch.dtype"),
            fields=("dtype",),
            called=("max_num_blocks_per_req(vllm_config, max_len)",),
        ),
        On(
            f"{_BACKEND}.AttentionMetadataBuilder",
            "our base class, and that of the dense builders",
            attributes=("device",),
            declared=(
                "__init__(self, kv_cache_spec, layer_names, vllm_config, device)",
                "build(self, common_prefix_len, common_attn_metadata, fast_build=False)",
                "build_for_cudagraph_capture(self, common_attn_metadata)",
            ),
        ),
    ),
    "vllm_quest/backend/backend.py": (
        On(
            f"{_BACKEND}.AttentionBackend",
            "what we answer, or what vLLM answers and we explain",
            attributes=("supported_kv_cache_dtypes", "validate_configuration"),
            declared=(
                "@staticmethod get_name()",
                "@classmethod customize_spec(cls, spec)",
                "@classmethod supports_attn_type(cls, attn_type)",
                "@classmethod supports_kv_cache_dtype(cls, kv_cache_dtype)",
                "@classmethod supports_non_causal(cls)",
                "@classmethod supports_sink(cls)",
                "@classmethod supports_rswa(cls)",
                "@classmethod supports_mm_prefix(cls)",
                "@classmethod supports_dcp(cls)",
                "@classmethod supports_pcp(cls)",
                "@classmethod supports_batch_invariance(cls)",
                "@classmethod supports_per_head_quant_scales(cls)",
                "@classmethod supports_device_cpu_query_lens_mismatch(cls)",
            ),
        ),
        On(
            f"{_BACKEND}.AttentionBackend.supports_kv_cache_update_bypass",
            "true in FlashAttentionBackend: a model may then write K and V itself, without bounds",
            since="0.33",
        ),
        On(
            f"{_SPEC}.AttentionSpec",
            "the enlarged page",
            attributes=("dtype: torch.dtype", "head_size: int", "state_content_bytes: int | None"),
            fields=("state_content_bytes",),
        ),
        On(
            "vllm.v1.worker.utils.customize_attention_spec",
            "the enlarged page",
            code=("spec = backend.customize_spec(spec)",),
        ),
    ),
    "vllm_quest/backend/impl.py": (
        On(f"{_BACKEND}.AttentionLayer", "a type only"),
        On(
            f"{_BACKEND}.AttentionImpl",
            "refusals by its arguments; what would write K or V, or read the output, past us",
            attributes=(
                "__init__",
                "scale",
                "supports_dcp",
                "supports_quant_query_input",
                "can_return_lse_for_decode",
            ),
            declared=(
                _FORWARD,
                "fused_output_quant_supported(self, quant_key)",
                "fused_rope_kvcache_supported(self)",
                "fused_qk_norm_rope_kvcache_supported(self)",
                "fused_qk_norm_mrope_kvcache_supported(self)",
            ),
        ),
        replace(_DENSE, name=f"{_BACKENDS}.cpu_attn.CPUAttentionBackendImpl"),
        replace(_DENSE, name=f"{_BACKENDS}.flash_attn.FlashAttentionImpl"),
        replace(_DENSE, name=f"{_BACKENDS}.triton_attn.TritonAttentionImpl"),
        On(
            f"{_LAYER}.Attention.__init__",
            "which arguments the impl gets, and that our name is looked up",
            code=(
                "impl_cls(num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, "
                "kv_cache_dtype, logits_soft_cap, attn_type, kv_sharing_target_layer_name, "
                "**extra_impl_args)",
                "AttentionBackendEnum[self.attn_backend.get_name()]",
            ),
        ),
        On(
            f"{_LAYER}.Attention.forward",
            "the cache is updated before attention",
            code=("not self.attn_backend.forward_includes_kv_cache_update",),
        ),
        On(
            f"{_LAYER}.attention.unified_kv_cache_update",
            "how do_kv_cache_update is called",
            code=(
                "attn_layer.impl.do_kv_cache_update(attn_layer, key, value, kv_cache, layer_slot_mapping)",
            ),
        ),
        On(
            f"{_LAYER}.attention.unified_attention_with_output",
            "how forward is called",
            code=(
                "self.impl.forward(self, query, key, value, kv_cache, attn_metadata, output=output, "
                "output_scale=output_scale, output_block_scale=output_block_scale)",
            ),
        ),
        On(f"{_LAYER}.Attention", "whose cache it is", attributes=("attn_backend", "kv_cache")),
    ),
}
