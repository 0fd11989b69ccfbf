"""Launchers of the compiled operations: warm-up leaves nothing to compile, wrong arguments are named."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from tests.kernels.cache import PagedCache
from vllm_quest.config import QuestConfig
from vllm_quest.formats.auto.cpu import attend_pages
from vllm_quest.kernels.bounds import PageBounds
from vllm_quest.kernels.cpu import select_pages
from vllm_quest.kernels.operations import Operations, Rows, Shapes
from vllm_quest.page import PageLayout
from vllm_quest.scorers.minmax import cpu as minmax

MODULES = [
    import_module(f"vllm_quest.{name}")
    for name in (
        "scorers.minmax.cpu.store",
        "formats.int4.cpu.store",
        "scorers.minmax.cpu.score",
        "kernels.cpu.select",
        "formats.auto.cpu",
        "formats.int4.cpu.attend",
        "formats.int4.cpu.dequantize",
    )
]
FACTORIES = [getattr(module, name) for module in MODULES for name in vars(module) if name.endswith("_kernel")]


FUNCTIONS = {
    "store": minmax.store,
    "score_pages": minmax.score_pages,
    "select_pages": select_pages,
    "attend_pages": attend_pages,
}


@pytest.mark.parametrize(
    ("reduce", "threshold", "entries"),
    [
        ("max", None, {}),
        ("softmax_mean", 6.0, {"bounds_dtype": "int8"}),
        ("max", None, {"kv_dtype": "int4", "bounds_dtype": "int8"}),
    ],
)
def test_warm_up_compiles_everything(reduce, threshold, entries) -> None:
    shape = {"num_kv_heads": 1, "block_size": 64, "page_size": 32, "head_size": 80}
    cache = PagedCache("cpu", dtype=torch.float16, **shape, **entries)
    config = replace(cache.config, group_reduce=reduce, value_threshold=threshold, token_budget=96)
    shapes = Shapes(16, 1, 3, 4, False, torch.device("cpu"))
    operations = Operations(cache.layout, config, "cpu", shapes)
    kernels = [factory.cache_info().misses for factory in FACTORIES]
    requests = [cache.new_request() for _ in range(3)]
    compiled = count_compilations(lambda: decode(cache, operations, requests))
    assert [factory.cache_info().misses for factory in FACTORIES] == kernels
    assert compiled == 0


def decode(cache: PagedCache, operations: Operations, requests: list[int]) -> None:
    def store(key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        operations.store(key, value, cache.pages, slots)

    cache.append(dict.fromkeys(requests, 127), padding=3, store=store)
    rows, query = Rows(*cache.rows(requests)), cache.random(3, 16)
    scores = operations.score_pages(query, cache.pages, rows, 0.1)
    for page_indices in (operations.select_pages(scores, rows), None):
        operations.attend_pages(query, cache.pages, rows, page_indices, 0.1)
    if not cache.layout.format.is_dense:
        key, value = torch.empty(1, 1, 80, 64).half().mT, torch.empty(1, 1, 64, 80).half()
        num_tokens = rows.seq_lens[:1].clamp(max=64)
        operations.dequantize_blocks(cache.pages, rows.block_table[0, :1], num_tokens, key, value)


def test_warm_up_without_a_budget_selects_nothing() -> None:
    """Every layer reads everything then; the list of all pages would take gigabytes."""
    config = QuestConfig(token_budget=None)
    layout = PageLayout.configured(config, 32, 32, torch.float32, for_cpu=True)
    shapes = Shapes(6, 2, 3, 4, True, torch.device("cpu"))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Operations(layout, config, "cpu", shapes)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < most + 2**20  # KiB


def count_compilations(run) -> int:
    from numba.core import event

    with event.install_recorder("numba:compile") as recorder:
        run()
    return len(recorder.buffer)


@pytest.fixture
def arguments() -> dict[str, tuple]:
    """Valid arguments of each operation, none of which is compiled before they are checked."""
    cache = PagedCache("cpu", num_blocks=2)
    views = cache.pages
    key = torch.zeros(1, 2, 32)
    query = torch.zeros(1, 4, 32)
    table, one = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    indices = torch.zeros(1, 2, 1, dtype=torch.int32)
    return {
        "store": (key, key, views.cache, views.summary, torch.zeros(1, dtype=torch.int64)),
        "score_pages": (query, views.summary, table, one, 1.0, "max"),
        "select_pages": (torch.zeros(1, 2, 4), one, 3, 1, 2),
        "attend_pages": (query, views.cache, table, one, indices, 8, 1.0),
    }


@pytest.mark.parametrize(
    ("operation", "position", "wrong", "name"),
    [
        ("store", 0, lambda key: key.double(), "key"),
        ("store", 1, lambda value: value[:, :1], "value"),
        ("store", 2, lambda cache: cache._replace(key=cache.key.contiguous()), "key_cache"),
        ("store", 2, lambda cache: cache._replace(value=cache.value.movedim(2, 3)), "value_cache"),
        ("store", 3, lambda bounds: PageBounds(bounds.values.bfloat16(), None), "bounds"),
        ("store", 3, lambda bounds: PageBounds(bounds.values[:1], None), "bounds"),
        ("store", 4, lambda slots: slots.int(), "slot_mapping"),
        ("score_pages", 0, lambda query: query[:, :3], "query"),
        ("score_pages", 1, lambda bounds: PageBounds(bounds.values[..., :16], None), "bounds"),
        ("score_pages", 2, lambda table: table.long(), "block_table"),
        ("score_pages", 3, lambda pages: pages[:0], "num_pages"),
        ("score_pages", 5, lambda _: "sum", "group_reduce"),
        ("select_pages", 0, lambda scores: scores.half(), "page_scores"),
        ("select_pages", 1, lambda pages: pages.long(), "num_pages"),
        ("select_pages", 2, lambda _: 2, "budget_pages"),
        ("attend_pages", 0, lambda query: query.int(), "query"),
        ("attend_pages", 3, lambda lens: lens.long(), "seq_lens"),
        ("attend_pages", 4, lambda indices: indices[:, :1], "page_indices"),
        ("attend_pages", 5, lambda _: 24, "page_size"),
    ],
)
def test_wrong_arguments_are_named(arguments, operation, position, wrong, name) -> None:
    changed = list(arguments[operation])
    changed[position] = wrong(changed[position])
    with pytest.raises(ValueError, match=f"^{name}: "):
        FUNCTIONS[operation](*changed)


BOUND = """
import os
import resource
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch
from vllm_quest.kernels.cpu.launch import use_torch_threads
assert use_torch_threads() == torch.get_num_threads() == 2
"""


def test_a_bound_thread_does_not_take_the_others_away() -> None:
    """As in a worker of vLLM: OpenMP has bound the importing thread to one core, and has more of them."""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_NUM_THREADS"}
    subprocess.run([sys.executable, "-c", BOUND], env=environment | {"OMP_NUM_THREADS": "2"}, check=True)
