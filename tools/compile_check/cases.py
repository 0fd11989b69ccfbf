"""What the compile check compiles: every launcher's call, in every configuration that it serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from vllm_quest.config import QuestConfig
from vllm_quest.formats.auto import triton as auto
from vllm_quest.formats.int4 import triton as int4
from vllm_quest.kernels.triton import select_pages
from vllm_quest.page import PageLayout, Pages
from vllm_quest.scorers.minmax import triton as minmax

ROWS, KV_HEADS, BLOCKS = 2, 2, 4
SCALE = 0.1


# (head size, page size, query heads per KV head)
GEOMETRIES = [
    *[(head, page, group) for head in (64, 128, 256) for page, group in ((8, 1), (16, 4), (32, 8))],
    (96, 16, 4),
    (128, 64, 16),
]
# The same, and how bounds and groups of V are stored in 4-bit pages
INT4_GEOMETRIES = [
    (64, 16, 8, "int8", 2),
    (128, 16, 4, "int8", 1),
    (128, 32, 16, "bfloat16", 4),
    (96, 64, 4, "int8", 3),
    (256, 16, 4, "int8", 8),
]


@dataclass(frozen=True)
class Case:
    """One launch configuration: the launcher's call that leads to it."""

    kernel: str
    configuration: str
    launch: Callable[[], object]


def pages_of(head_size: int, page_size: int, bounds_dtype: str, value_groups: int | None = None) -> Pages:
    """A cache in bfloat16, or in 4 bits with `value_groups`."""
    block_size = max(32, page_size)
    config = QuestConfig(
        token_budget=None,
        page_size=page_size,
        kv_dtype="auto" if value_groups is None else "int4",
        bounds_dtype=bounds_dtype,
        value_group_size=head_size // value_groups if value_groups and value_groups > 1 else None,
    )
    layout = PageLayout.configured(config, block_size, head_size, torch.bfloat16, for_cpu=False)
    cache = torch.zeros(BLOCKS, KV_HEADS, block_size, layout.content_size, dtype=layout.cache_dtype)
    return layout.views(cache)


def launch_store(
    head_size: int, page_size: int, tokens: int, bounds_dtype: str, value_groups: int | None = None
) -> None:
    pages = pages_of(head_size, page_size, bounds_dtype, value_groups)
    key = torch.zeros(tokens, KV_HEADS, head_size, dtype=torch.bfloat16)
    slots = torch.zeros(tokens, dtype=torch.int64)
    if value_groups is None:
        minmax.store(key, key, pages.cache, pages.summary, slots)
    else:
        int4.store(key, key, pages.cache, slots)


def launch_score(
    head_size: int,
    page_size: int,
    group: int,
    group_reduce: str,
    bounds_dtype: str,
    value_groups: int | None = None,
) -> None:
    query = torch.zeros(ROWS, KV_HEADS * group, head_size, dtype=torch.bfloat16)
    counts, table = torch.ones(ROWS, dtype=torch.int32), torch.zeros(ROWS, 64, dtype=torch.int32)
    bounds = pages_of(head_size, page_size, bounds_dtype, value_groups).summary
    minmax.score_pages(query, bounds, table, counts, SCALE, group_reduce)


def launch_select(max_pages: int) -> None:
    scores = torch.zeros(ROWS, KV_HEADS, max_pages)
    select_pages(scores, torch.ones(ROWS, dtype=torch.int32), 128, 1, 2)


def launch_attend(
    head_size: int,
    page_size: int,
    group: int,
    value_threshold: float | None,
    bounds_dtype: str = "auto",
    value_groups: int | None = None,
) -> None:
    pages = pages_of(head_size, page_size, bounds_dtype, value_groups)
    query = torch.zeros(ROWS, KV_HEADS * group, head_size, dtype=torch.bfloat16)
    counts, table = torch.ones(ROWS, dtype=torch.int32), torch.zeros(ROWS, 64, dtype=torch.int32)
    indices = torch.zeros(ROWS, KV_HEADS, 2048 // page_size, dtype=torch.int32)
    kernels = auto if value_groups is None else int4
    kernels.attend_pages(
        query, pages.cache, table, counts, indices, page_size, SCALE, value_threshold=value_threshold
    )


def launch_dequantize(head_size: int, page_size: int, bounds_dtype: str, value_groups: int) -> None:
    cache = pages_of(head_size, page_size, bounds_dtype, value_groups).cache
    block_size = cache.value.params.shape[2]
    out = torch.zeros(ROWS, KV_HEADS, block_size, 2 * head_size, dtype=torch.bfloat16)
    blocks = torch.zeros(ROWS, dtype=torch.int32)
    int4.dequantize_blocks(cache, blocks, blocks, *out.chunk(2, -1))


def int4_cases() -> list[Case]:
    """4-bit pages: each of the geometries with other bounds and groups of V."""
    found = []
    for head_size, page_size, group, bounds, groups in INT4_GEOMETRIES:
        geometry = f"head {head_size}, page {page_size}, {bounds} bounds, {groups} groups"
        steps = {"decode": 64, "prefill": 8192} if page_size == 32 else {"decode": 64}
        for name, tokens in steps.items():
            call = partial(launch_store, head_size, page_size, tokens, bounds, groups)
            found.append(Case("store_int4", f"{geometry}, {name}", call))
        for name, threshold in (("", None), (", threshold", 6.5)):
            call = partial(launch_attend, head_size, page_size, group, threshold, bounds, groups)
            found.append(Case("attend_int4", f"{geometry}, group {group}{name}", call))
        # Other strides than those of 16-bit pages.
        call = partial(launch_score, head_size, page_size, group, "max", bounds, groups)
        found.append(Case("score", f"{geometry}, group {group}, max", call))
        call = partial(launch_dequantize, head_size, page_size, bounds, groups)
        found.append(Case("dequantize", geometry, call))
    return found


def cases() -> list[Case]:
    found = []
    for head_size, page_size, group in GEOMETRIES:
        geometry = f"head {head_size}, page {page_size}"
        for bounds in ("auto", "int8"):
            suffix = "" if bounds == "auto" else f", {bounds} bounds"
            for name, tokens in (("decode", 64), ("prefill", 8192)):
                call = partial(launch_store, head_size, page_size, tokens, bounds)
                found.append(Case("store", f"{geometry}, {name}{suffix}", call))
            # `mean` differs from `max` in one instruction: once is enough.
            reduces = ("max", "softmax_mean", "mean") if head_size == 96 else ("max", "softmax_mean")
            for reduce in reduces:
                call = partial(launch_score, head_size, page_size, group, reduce, bounds)
                found.append(Case("score", f"{geometry}, group {group}, {reduce}{suffix}", call))
        for name, threshold in (("", None), (", threshold", 6.5)):
            call = partial(launch_attend, head_size, page_size, group, threshold)
            found.append(Case("attend", f"{geometry}, group {group}{name}", call))
    for max_pages in (512, 2048, 4112, 65536):
        found.append(Case("select", f"{max_pages} pages", partial(launch_select, max_pages)))
    return found + int4_cases()
