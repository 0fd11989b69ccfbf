"""Start-up, configuration, the page, the counters."""

from __future__ import annotations

from tests.contract.reliance import Contract, On

_SPEC = "vllm.v1.kv_cache_interface"
_ENUM = "vllm.v1.attention.backends.registry.AttentionBackendEnum"
_VLLM_CONFIG = "vllm.config.VllmConfig"

STARTUP: Contract = {
    "pyproject.toml": (
        On("vllm.plugins.DEFAULT_PLUGINS_GROUP", "vllm_quest:register", value="vllm.general_plugins"),
        On(
            "vllm.plugins.load_general_plugins",
            "every process of vLLM calls vllm_quest.register()",
            code=("load_plugins_by_group(group=DEFAULT_PLUGINS_GROUP)", "func()"),
        ),
        On("vllm.plugins.PLATFORM_PLUGINS_GROUP", "vllm_quest:cpu_platform", value="vllm.platform_plugins"),
        On(
            "vllm.platforms.resolve_current_platform_cls_qualname",
            "a single plugin outside vLLM wins over vLLM's own platforms",
            code=(
                "load_plugins_by_group(PLATFORM_PLUGINS_GROUP)",
                "platform_cls_qualname = platform_plugins[activated_oot_plugins[0]]()",
            ),
        ),
        On(
            "vllm.engine.arg_utils.EngineArgs",
            "the two arguments that users give",
            attributes=("attention_backend", "additional_config"),
        ),
    ),
    "vllm_quest/registration.py": (
        On("vllm.platforms.current_platform", "which backend, and whose CPU platform"),
        On(
            "vllm.platforms.Platform",
            "what current_platform is",
            called=("is_cuda()", "is_rocm()", "is_cpu()"),
        ),
        On(
            "vllm.platforms.cpu_platform_plugin",
            "None where the build is not for CPU",
            called=("cpu_platform_plugin()",),
            code=("return None", "return 'vllm.platforms.cpu.CpuPlatform'"),
        ),
    ),
    "vllm_quest/compat.py": (
        On(
            "vllm.v1.attention.backends.registry.register_backend",
            "makes --attention-backend QUEST valid",
            called=("register_backend(backend, class_path)",),
            code=("AttentionBackendEnum.register(backend, class_path or '')",),
        ),
        On(
            _ENUM,
            "members are found by name and take an instance attribute __reduce_ex__",
            bases=("Enum",),
            called=("register(name, value)",),
        ),
        On(
            f"{_ENUM}.register",
            "the new member is in __members__ and found by name",
            code=("member = object.__new__(cls)", "cls._member_map_[name] = member"),
        ),
        On("vllm.config.cache", "where names of cache dtypes are registered, if they can be"),
        On(
            "vllm.config.cache.register_kv_cache_dtype",
            "makes --kv-cache-dtype quest_int4 valid",
            called=("register_kv_cache_dtype(name)",),
            since="0.33",
        ),
        On(
            "vllm.config.cache.KVCacheDTypeHandler",
            "what register_kv_cache_dtype decorates",
            declared=("torch_dtype(self)", "quant_mode(self)"),
            since="0.33",
        ),
        On("vllm.config.cache.KV_CACHE_DTYPES", "whether the name is registered", since="0.33"),
        On(f"{_SPEC}.KVQuantMode", "what the handler answers", members=("NONE = 0",)),
        On(
            f"{_VLLM_CONFIG}.use_v2_model_runner",
            "the environment chooses the model runner",
            code=("use_v2_model_runner = envs.VLLM_USE_V2_MODEL_RUNNER", "return use_v2_model_runner"),
        ),
    ),
    "vllm_quest/config.py": (
        On(
            _VLLM_CONFIG,
            "what an engine was started with",
            attributes=(
                "additional_config",
                "model_config: ModelConfig",
                "cache_config: CacheConfig",
                "parallel_config: ParallelConfig",
                "scheduler_config: SchedulerConfig",
            ),
        ),
        On("vllm.config.ModelConfig", "refusals", attributes=("use_mla", "is_encoder_decoder")),
        On(
            "vllm.config.CacheConfig",
            "refusals",
            attributes=("cache_dtype", "block_size", "user_specified_block_size"),
        ),
        On("vllm.config.ParallelConfig", "refusals", attributes=("decode_context_parallel_size",)),
        On(
            "vllm.config.SchedulerConfig",
            "whether each prompt comes in one step",
            attributes=("enable_chunked_prefill", "long_prefill_token_threshold"),
        ),
        On(
            "vllm.v1.core.sched.scheduler.Scheduler.schedule",
            "without chunked prefill a prompt waits until a step has room for all of it",
            code=("self.scheduler_config.enable_chunked_prefill",),
        ),
        On(
            "vllm.config.get_current_vllm_config_or_none",
            "the engine that this process is building",
            called=("get_current_vllm_config_or_none()",),
        ),
    ),
    "vllm_quest/page.py": (
        On(f"{_SPEC}.AttentionSpec", "what a layer's blocks hold", attributes=("block_size", "head_size")),
        On(
            f"{_SPEC}.AttentionSpec.state_content_size_bytes",
            "state_content_bytes is C of the cache [B, H, N, C]",
            code=("return self.state_content_bytes",),
        ),
        On(
            f"{_SPEC}.compute_layer_kv_cache_shape_bytes",
            "the cache is [B, H, N, C]",
            code=(
                "return (num_blocks * blocks_per_page, spec.num_heads, spec.get_num_kernel_states(bs), "
                "spec.state_content_size_bytes)",
            ),
        ),
        On(f"{_SPEC}.create_kv_cache_views", "in the spec's dtype", code=("cache_logical.view(dtype)",)),
        On(
            f"{_SPEC}.KVCacheLayout",
            "one (block, KV head) run is contiguous",
            members=("LBHNC = (0, 1, 2, 3, 4)",),
        ),
    ),
    "vllm_quest/metrics.py": (
        On(
            "vllm.v1.metrics.prometheus.get_prometheus_registry",
            "/metrics shows prometheus_client's default registry",
            code=("return REGISTRY",),
        ),
    ),
}
