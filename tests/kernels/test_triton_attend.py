"""What is Triton's own of attention: splits, what is not loaded, the buffers of CUDA graphs, checks."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cache import PagedCache
from tests.kernels.conformance import EXACT, QUIET, Case, case_of, dense_line
from tests.kernels.interpreter import DEVICE, DTYPES, TOLERANCE, on_device
from tests.kernels.test_attend import assert_attends, random_pages
from vllm_quest.config import QuestConfig
from vllm_quest.formats.auto.reference import attend_pages as attend_reference
from vllm_quest.formats.auto.triton import attend_pages
from vllm_quest.kernels.triton.workspace import Workspace, attend_scratch
from vllm_quest.page import PageLayout

pytestmark = QUIET


def test_thousands_of_pages() -> None:
    line = dense_line(DTYPES[-1], block_size=256, head_size=16, group=2)._replace(kv_heads=1)
    case = case_of(line, "triton", [16400])
    for budget in (2050, 2000):
        assert_attends(case, random_pages(case.num_pages, 1, budget))


def test_values_below_the_threshold_are_not_loaded() -> None:
    """Every tile of tokens begins with each head's top: what is to be read does not depend on the splits."""
    group, size, near, far = 3, 577, -5.0, -15.0
    cache = PagedCache("triton", num_kv_heads=1, block_size=32, head_size=64, dtype=DTYPES[0])
    generator = torch.Generator().manual_seed(3)
    logits = torch.tensor([0.0, near, far, far, far, far])[
        torch.randint(6, (size, group), generator=generator)
    ]
    logits[::64] = 0.0
    key = torch.zeros(size, 1, 64)
    key[:, 0, :group] = logits
    request = cache.new_request()
    cache.append({request: size}, key=key.to(DTYPES[0]), store=cache.reference.store)
    unread = (logits == far).all(1).nonzero().flatten()
    assert 100 < len(unread) < 400
    table, seq_lens, num_pages = cache.rows([request])
    cache.pages.cache.value[table[0].long()[unread // 32], :, unread % 32] = torch.nan
    case = Case(cache, table, seq_lens, num_pages, torch.eye(64)[None, :group].to(DTYPES[0]))
    pages = random_pages(num_pages, 1, int(num_pages))
    assert_attends(case, pages, 1.0, value_threshold=10.0)
    arguments = (case.query, table, seq_lens, pages, 1.0)
    assert cache.kernels.attend_pages(*arguments).isnan().any()
    assert cache.kernels.attend_pages(*arguments, value_threshold=16.0).isnan().any()


def test_persistent_buffers_serve_one_step_after_another() -> None:
    case = case_of(dense_line(DTYPES[0]), "triton", [577, 63, 300])
    workspace = Workspace.allocate(attend_scratch(6, 4, 64, 40 * 8, DEVICE), 6, DEVICE)
    workspace.scratch.fill_(torch.nan)
    out = torch.full((3, 8, 64), torch.nan, dtype=DTYPES[0], device=DEVICE)
    cache = case.cache.layout.views(case.cache.cache.to(DEVICE)).cache
    bound = TOLERANCE[DTYPES[0]]
    for seed, lengths in enumerate([[577, 63, 300], [9, 63, 0], [400, 1, 299]]):
        seq_lens, query = torch.tensor(lengths, dtype=torch.int32), case.cache.random(3, 4)
        pages = random_pages((seq_lens + 7) // 8, 2, 40, seed)
        rows = on_device(case.table, seq_lens, pages)
        buffers = {"out": out, "workspace": workspace}
        assert attend_pages(query.to(DEVICE), cache, *rows, 8, 0.125, **buffers) is out
        expected = case.cache.reference.attend_pages(query, case.table, seq_lens, pages, 0.125)
        expected = expected.nan_to_num(0)  # rows without pages
        torch.testing.assert_close(out.cpu(), expected, rtol=bound, atol=bound)
        assert not workspace.arrivals.any()


def test_strides_of_blocks_heads_and_queries_are_free() -> None:
    layout = PageLayout.configured(QuestConfig(**EXACT), 16, 32, DTYPES[0], for_cpu=False)
    cache = torch.randn(3, 5, 16, layout.content_size).to(DTYPES[0])  # heads before blocks
    pages = layout.views(cache.transpose(0, 1))
    on_gpu = layout.views(cache.to(DEVICE).transpose(0, 1))
    query = torch.randn(2, 3, 6, 32).to(DTYPES[0])[:, 0]  # a slice of one projection
    table = torch.tensor([[4, 1], [0, 2]], dtype=torch.int32)
    seq_lens = torch.tensor([20, 32], dtype=torch.int32)
    indices = random_pages(torch.tensor([3, 4]), 3, 2)
    actual = attend_pages(query.to(DEVICE), on_gpu.cache, *on_device(table, seq_lens, indices), 8, 0.2)
    expected = attend_reference(query, pages.cache, table, seq_lens, indices, 8, 0.2)
    torch.testing.assert_close(actual.cpu(), expected, rtol=2**-7, atol=2**-7)


def test_what_the_kernel_relies_on_is_checked() -> None:
    case = case_of(dense_line(DTYPES[0]), "triton", [63])
    query, cache, rows = case.query, case.cache.pages.cache, (case.table, case.seq_lens)
    pages = random_pages(case.num_pages, 2, 4)
    apart = cache._replace(value=cache.value.contiguous())
    for arguments, message in [
        ((query, cache, *rows, pages, 12), "page_size: 12; allowed: a power of two"),
        ((query, apart, *rows, pages, 8), "key_cache, value_cache: strides"),
        ((query[:, :3], cache, *rows, pages, 8), "3 heads for 2 KV heads"),
        ((query, cache, *rows, pages.mT.contiguous().mT, 8), "page_indices: the last dimension"),
    ]:
        with pytest.raises(ValueError, match=message):
            attend_pages(*arguments, 1.0)
