"""The entry points that vLLM calls. They register names and import nothing heavy."""

from __future__ import annotations

import logging

BACKEND_NAME = "QUEST"
INT4_CACHE_DTYPE = "quest_int4"  # --kv-cache-dtype, where vLLM accepts new names


def register() -> None:
    """``vllm.general_plugins``: makes ``--attention-backend QUEST`` valid, in every process of vLLM.

    vLLM may call this more than once in a process.
    """
    from vllm_quest import compat, metrics

    if path := backend_path():
        compat.register_backend(BACKEND_NAME, path)
        compat.register_kv_cache_dtype(INT4_CACHE_DTYPE)
        metrics.export()


def backend_path() -> str | None:
    """The backend of this process's platform; None where there is none, so that selecting it is an error."""
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        return "vllm_quest.backend.cuda.QuestCUDABackend"
    if current_platform.is_rocm():
        return "vllm_quest.backend.rocm.QuestROCmBackend"
    if not current_platform.is_cpu():
        return None
    if type(current_platform).__module__ != "vllm_quest.backend.cpu_platform":
        # vLLM's own CPU platform would take the name and attend densely.
        logging.getLogger("vllm.plugins.quest").warning(
            "QUEST is not available: vLLM uses %s, not the plugin's platform. With "
            "VLLM_TARGET_DEVICE=cpu vLLM ignores platform plugins; unset it.",
            type(current_platform).__name__,
        )
        return None
    return "vllm_quest.backend.cpu.QuestCPUBackend"


def cpu_platform() -> str | None:
    """``vllm.platform_plugins``: the platform class of CPU builds, which can select QUEST; else None."""
    from vllm.platforms import cpu_platform_plugin

    if cpu_platform_plugin() is None:
        return None
    return "vllm_quest.backend.cpu_platform.QuestCpuPlatform"
