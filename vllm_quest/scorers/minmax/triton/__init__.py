"""QUEST's scorer in Triton."""

from vllm_quest.scorers.minmax.triton.score import score_pages, score_scratch
from vllm_quest.scorers.minmax.triton.store import store

__all__ = ["STORES", "score_pages", "score_scratch", "store"]

STORES = {"auto": store}
