"""The CPU platform with one more attention backend to choose.

vLLM's `CpuPlatform` ignores ``attention_backend``; everything else stays as vLLM detected it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.platforms import cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_quest import compat
from vllm_quest.backend.support import refusal
from vllm_quest.config import QuestConfig
from vllm_quest.registration import BACKEND_NAME

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig
else:
    CpuPlatform = resolve_obj_by_qualname(cpu_platform_plugin())

# A switch for tests: vLLM's Ray executor does not know CPUs. With it a CPU worker is placed as if it needed
# a GPU, on a cluster whose GPUs are logical.
RAY_EXECUTOR_VARIABLE = "QUEST_TEST_RAY_EXECUTOR_ON_CPU"

logger = init_logger("vllm.plugins.quest")


class QuestCpuPlatform(CpuPlatform):
    """vLLM's CPU platform; honours ``attention_backend="QUEST"``."""

    if os.environ.get(RAY_EXECUTOR_VARIABLE) == "1":
        ray_device_key = "GPU"
        device_control_env_var = "QUEST_TEST_VISIBLE_DEVICES"

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Checks the QUEST configuration where the user can see the error: before any process starts."""
        super().check_and_update_config(vllm_config)
        attention = vllm_config.attention_config
        chosen = [attention.backend, *(attention.backend_per_kind or {}).values()]
        names = [backend.name for backend in chosen if backend is not None]
        if BACKEND_NAME in names:
            QuestConfig.from_vllm_config(vllm_config)
        elif "quest" in (vllm_config.additional_config or {}):
            logger.warning_once(
                "additional_config['quest'] has no effect: --attention-backend is %s, not %s",
                ", ".join(names) or "not given",
                BACKEND_NAME,
            )

    @classmethod
    def get_attn_backend_cls(
        cls,
        selected_backend: AttentionBackendEnum,
        attn_selector_config: AttentionSelectorConfig,
        num_heads: int | None = None,
    ) -> str:
        """QUEST where it was selected and fits, an error where it does not fit, else vLLM's own choice.

        Raises:
            ValueError: QUEST was selected for a layer that it does not support; says why.
        """
        if selected_backend is None or selected_backend.name != BACKEND_NAME:
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        backend = selected_backend.get_class()
        reasons = backend.validate_configuration(device_capability=None, **attn_selector_config._asdict())
        if reasons:
            raise refusal(reasons)
        return selected_backend.get_path()

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        """As in vLLM, also in a process that has loaded numba."""
        with compat.llvmlite_hidden():
            super().register_triton_kernel_overrides()
