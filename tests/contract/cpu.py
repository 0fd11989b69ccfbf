"""The CPU platform and the CPU backend."""

from __future__ import annotations

from tests.contract.reliance import Contract, On

_BACKEND = "vllm.v1.attention.backend"
_CPU = "vllm.v1.attention.backends.cpu_attn"
_ENUM = "vllm.v1.attention.backends.registry.AttentionBackendEnum"
_HALVES = ("kv_cache.view((num_blocks, num_kv_heads, block_size * 2, -1))", "kv_cache.chunk(2, dim=2)")

CPU: Contract = {
    "vllm_quest/backend/cpu_platform.py": (
        On("vllm.logger.init_logger", "our lines go where vLLM's go", called=("init_logger(name)",)),
        On("vllm.logger._VllmLogger", "what it returns", called=("warning_once(msg, backend, ours)",)),
        On("vllm.platforms.cpu_platform_plugin", "our base class", called=("cpu_platform_plugin()",)),
        On(
            "vllm.utils.import_utils.resolve_obj_by_qualname",
            "the class of that name",
            called=("resolve_obj_by_qualname(qualname)",),
        ),
        On(
            "vllm.platforms.cpu.CpuPlatform",
            "where the Ray executor places workers, and how it knows their device; tests only",
            attributes=("ray_device_key", "device_control_env_var"),
        ),
        On(
            "vllm.platforms.cpu.CpuPlatform",
            "the methods that we add to",
            bases=("Platform",),
            called=(
                "check_and_update_config(vllm_config)",
                "get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)",
                "register_triton_kernel_overrides()",
            ),
            declared=(
                "@classmethod check_and_update_config(cls, vllm_config)",
                "@classmethod get_attn_backend_cls(cls, selected_backend, attn_selector_config, "
                "num_heads=None)",
                "@classmethod register_triton_kernel_overrides(cls)",
            ),
        ),
        On(
            "vllm.v1.attention.selector.get_attn_backend",
            "it hands over --attention-backend",
            code=("backend = attention_config.backend",),
        ),
        On(
            "vllm.v1.attention.selector._cached_get_attn_backend",
            "how get_attn_backend_cls is called, and that it answers with a path",
            code=(
                "current_platform.get_attn_backend_cls(backend, attn_selector_config=attn_selector_config, "
                "num_heads=num_heads)",
                "resolve_obj_by_qualname(attention_cls)",
            ),
        ),
        On(
            "vllm.v1.attention.selector.AttentionSelectorConfig",
            "what validate_configuration is asked",
            attributes=("_asdict",),
        ),
        On(
            f"{_BACKEND}.AttentionBackend",
            "validate_configuration takes every field of AttentionSelectorConfig",
            called=(
                "validate_configuration(device_capability=..., "
                "**vllm.v1.attention.selector.AttentionSelectorConfig)",
            ),
        ),
        On(_ENUM, "the selected backend", attributes=("name",), called=("get_class()", "get_path()")),
        On(
            "vllm.config.VllmConfig",
            "where --attention-backend lies",
            attributes=("attention_config: AttentionConfig", "additional_config"),
        ),
        On(
            "vllm.config.AttentionConfig",
            attributes=("backend: AttentionBackendEnum | None", "backend_per_kind"),
        ),
    ),
    "vllm_quest/backend/cpu.py": (
        On("vllm.config.VllmConfig", "a type only"),
        On("vllm.v1.kv_cache_interface.AttentionSpec", "a type only"),
        On(
            f"{_BACKEND}.CommonAttentionMetadata",
            "which requests decode, and their contexts",
            attributes=(
                "query_start_loc_cpu: torch.Tensor",
                "seq_lens: torch.Tensor",
                "block_table_tensor: torch.Tensor",
                "is_prefilling: torch.Tensor | None",
                "causal: bool | torch.Tensor",
            ),
        ),
        On(
            f"{_BACKEND}.AttentionBackend",
            "our classes",
            declared=("@staticmethod get_impl_cls()", "@staticmethod get_builder_cls()"),
        ),
        On(
            f"{_CPU}.CPUAttentionBackend",
            "our base class",
            bases=("AttentionBackend",),
            attributes=("forward_includes_kv_cache_update",),
            declared=("@staticmethod get_impl_cls()", "@staticmethod get_builder_cls()"),
        ),
        On(
            f"{_CPU}.CPUAttentionBackend.supported_kv_cache_layouts",
            "head-major blocks",
            code=("return (KVCacheLayout.LBHNC,)",),
        ),
        On(
            f"{_CPU}.CPUAttentionMetadataBuilder",
            "the builder of dense rows; it reads isa, which we set",
            bases=("AttentionMetadataBuilder",),
            attributes=("head_dim", "isa"),
            called=(
                "_set_isa_to_layers(layer_names)",
                "build(common_prefix_len, common_attn_metadata, fast_build)",
            ),
            declared=(
                "__init__(self, kv_cache_spec, layer_names, vllm_config, device)",
                "build(self, common_prefix_len, common_attn_metadata, fast_build=False)",
            ),
        ),
        On(
            f"{_CPU}.CPUAttentionMetadataBuilder._group_sliding_window",
            "which layers the builder of dense rows looks at",
            code=("isinstance(layer.impl, CPUAttentionBackendImpl)",),
        ),
        On(
            f"{_CPU}.CPUAttentionMetadataBuilder._set_isa_to_layers",
            "the layers use the ISA that we set",
            code=("layer.isa = self.isa",),
        ),
        On(
            f"{_CPU}._get_attn_isa",
            "the two ISAs that keep K as plain [D, N]",
            called=("_get_attn_isa(dtype, block_size, head_size, kv_cache_dtype)",),
            code=("return 'vec'", "return 'vec16'"),
        ),
        On(
            f"{_CPU}.CPUAttentionBackendImpl",
            "our base class",
            bases=("AttentionImpl",),
            attributes=("alibi_slopes", "logits_soft_cap", "sinks", "scale", "num_kv_heads", "head_size"),
            declared=(
                "forward(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, "
                "output_block_scale=None)",
            ),
        ),
        On(f"{_CPU}.CPUAttentionBackendImpl.forward", "K and V are the halves of a run", code=_HALVES),
        On(
            f"{_CPU}.CPUAttentionBackendImpl.do_kv_cache_update",
            "K and V are the halves of a run",
            code=_HALVES,
        ),
    ),
}
