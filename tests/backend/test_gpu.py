"""The GPU backend end to end without a GPU and a model: its kernels under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport

import vllm_quest
from tests.backend.harness import DenseBuilder, DenseImpl, Engine
from tests.kernels import interpreter  # noqa: F401  must come before what imports our Triton kernels
from vllm_quest.backend.cpu import QuestCPUBackend
from vllm_quest.backend.gpu import QuestGPUBackend, QuestGPUMetadataBuilder
from vllm_quest.backend.impl import QuestImpl

QUEST = {
    "token_budget": 48,
    "page_size": 8,
    "dense_layers": 1,
    "sink_pages": 1,
    "recent_pages": 2,
    "bounds_dtype": "auto",
}


class Builder(QuestGPUMetadataBuilder):
    dense_builder = DenseBuilder


class Impl(QuestImpl, DenseImpl):
    dense_impl = DenseImpl


class Backend(QuestGPUBackend, AttentionBackend):
    @staticmethod
    def get_impl_cls():
        return Impl

    @staticmethod
    def get_builder_cls():
        return Builder


def cpu_engine(quest: dict, speculated: int = 0) -> Engine:
    return Engine(QuestCPUBackend, quest, speculated, poison=1e3)


# Steps of (request, new tokens, still in its prompt); decoding requests first, as vLLM orders them.
STEPS = [
    [(0, 40, True)],
    [(0, 1, False), (1, 70, True)],
    [(0, 1, False), (1, 57, True), (2, 9, True)],
    [(0, 1, False), (1, 1, False), (2, 1, False)],
    [(1, 1, False), (2, 1, False), (3, 100, True)],
    [(3, 1, False), (2, 1, False), (1, 1, False), (0, 1, False)],
]


@pytest.mark.parametrize(
    "changes",
    [
        *[{"group_reduce": reduce} for reduce in ("max", "mean", "softmax_mean")],
        *[{"min_context": tokens} for tokens in (30, 72, 320)],  # within the budget, beyond, always
        {"bounds_dtype": "int8"},
        {"token_budget": None},
    ],
)
def test_same_results_as_the_cpu_backend(changes) -> None:
    gpu = Engine(Backend, QUEST | changes)
    cpu = cpu_engine(QUEST | changes)
    for seed, work in enumerate(STEPS):
        for got, expected in zip(gpu.step(work, seed), cpu.step(work, seed), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
    for engine in (gpu, cpu):
        engine.finish(1)
    for got, expected in zip(gpu.step([(1, 55, True)], 50), cpu.step([(1, 55, True)], 50), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
    for got, expected in zip(gpu.step([(1, 1, False)], 51), cpu.step([(1, 1, False)], 51), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("min_context", [0, 72])
def test_same_counts_as_the_cpu_backend(min_context) -> None:
    deltas = []
    quest = QUEST | {"min_context": min_context}
    for engine in (Engine(Backend, quest), cpu_engine(quest)):
        before = vllm_quest.read_counters()
        for seed, work in enumerate(STEPS):
            engine.step(work, seed)
        after = vllm_quest.read_counters()
        deltas.append({key: after[key] - before[key] for key in after})
    assert deltas[0] == deltas[1]
    assert deltas[0]["decode_rows_sparse"] > 0


def test_drafts_are_rows_of_their_own() -> None:
    """Tokens that are verified at once see what tokens that come one by one see."""
    at_once, cpu = Engine(Backend, QUEST, speculated=2), cpu_engine(QUEST, speculated=2)
    for seed, work in enumerate(
        [[(0, 90, True), (1, 30, True)], [(0, 3, False), (1, 2, False)], [(0, 1, False)]]
    ):
        for got, expected in zip(at_once.step(work, seed), cpu.step(work, seed), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


def test_padding_of_a_cuda_graph_writes_no_garbage() -> None:
    engine = Engine(Backend, QUEST | {"dense_layers": 0})
    engine.step([(0, 80, True)], 0)
    engine.lengths[1] = -1  # with its one token: a request of length 0
    engine.tables[1] = 2**30
    batch = engine.batch([(0, 1, False), (1, 1, False)])
    batch.query_start_loc_cpu = torch.tensor([0, 1, 1], dtype=torch.int32)
    batch.slot_mapping[1] = -1
    for output in engine.run(batch, 1):
        assert output[0].isfinite().all()
        assert output[1].eq(0).all()


def test_what_the_builder_promises() -> None:
    assert Builder.get_cudagraph_support(None, None) is AttentionCGSupport.UNIFORM_BATCH
    assert Backend.forward_includes_kv_cache_update is False
    assert Engine(Backend, QUEST, speculated=2).builder.reorder_batch_threshold == 3


def test_rows_that_read_everything_have_no_pages_to_score() -> None:
    engine = Engine(Backend, QUEST | {"min_context": 72})
    engine.step([(0, 20, True), (1, 70, True), (2, 90, True)], 0)
    engine.step([(0, 1, False), (1, 1, False), (2, 1, False)], 1)
    assert engine.builder.row_pages[:3].tolist() == [0, 0, 12]
    engine.step([(1, 1, False), (2, 1, False)], 2)
    assert engine.builder.row_pages[:2].tolist() == [9, 12]


@pytest.mark.parametrize("backend", [Backend, QuestCPUBackend])
def test_the_value_threshold_reaches_the_kernel(backend) -> None:
    outputs = []
    for threshold in (None, 1e3, 1e-3):
        engine = Engine(backend, QUEST | {"dense_layers": 0, "value_threshold": threshold})
        engine.step([(0, 90, True)], 0)
        outputs.append(engine.step([(0, 1, False)], 1)[0])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=2e-5)
    assert not outputs[0].isclose(outputs[2], atol=0.1).all()
