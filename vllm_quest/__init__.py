"""QUEST for vLLM: decode long contexts by reading only the KV pages that matter to the query."""

from vllm_quest.registration import cpu_platform, register

__version__ = "0.1.0"

__all__ = ["__version__", "cpu_platform", "read_counters", "register"]


def read_counters() -> dict[str, int]:
    """What QUEST did so far in the engines that this process started; see `metrics.read_counters`."""
    from vllm_quest.metrics import read_counters

    return read_counters()
