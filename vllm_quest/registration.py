"""The entry points that vLLM calls. They register names and import nothing heavy."""

from __future__ import annotations

BACKEND_NAME = "QUEST"
BACKEND_PATH = "vllm_quest.backend.cpu.QuestCPUBackend"


def register() -> None:
    """``vllm.general_plugins``: makes ``--attention-backend QUEST`` valid, in every process of vLLM.

    vLLM may call this more than once in a process.
    """
    from vllm_quest import compat, metrics

    compat.register_backend(BACKEND_NAME, BACKEND_PATH)
    metrics.export()


def cpu_platform() -> str | None:
    """``vllm.platform_plugins``: the platform class of CPU builds, which can select QUEST; else None."""
    from vllm.platforms import cpu_platform_plugin

    if cpu_platform_plugin() is None:
        return None
    return "vllm_quest.backend.cpu_platform.QuestCpuPlatform"
