"""What the instrument asks of a running engine's workers."""

from __future__ import annotations

from typing import Any

from vllm_quest.config import QuestConfig

__all__ = ["MeasuredWorker"]


class MeasuredWorker:
    """Methods that vLLM adds to its worker when started with ``worker_extension_cls``."""

    model_runner: Any  # vLLM's
    vllm_config: Any

    def configure_quest(self, entries: dict[str, Any]) -> None:
        """Selects by another `quest` configuration from the next step on; what is cached stays.

        Needs eager execution: a captured CUDA graph holds the configuration that it was captured with.

        Raises:
            ValueError: The configuration does not fit the cache or the engine.
        """
        config = QuestConfig.from_dict(entries)
        config.check_engine(self.vllm_config)
        for groups in self.model_runner.attn_groups:
            for group in groups:
                for builder in group.metadata_builders:
                    if config.cache_fields != builder.config.cache_fields:
                        raise ValueError(
                            f"the engine's cache lies as {builder.config.cache_fields}, not as "
                            f"{config.cache_fields}: start another engine"
                        )
                    builder.configure(config)

    def kv_bytes_per_token(self) -> float:
        """What one token of context takes in this worker's KV cache, all layers together."""
        specs = self.get_kv_cache_spec().values()  # type: ignore[attr-defined]
        return sum(spec.page_size_bytes / spec.block_size for spec in specs)
