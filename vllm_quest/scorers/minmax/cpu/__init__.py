"""QUEST's scorer, compiled for CPUs."""

from vllm_quest.scorers.minmax.cpu.score import score_pages
from vllm_quest.scorers.minmax.cpu.store import store
from vllm_quest.scorers.minmax.reference import summarize  # over formats without a store in `STORES`

__all__ = ["STORES", "score_pages", "store", "summarize"]

STORES = {"auto": store}
