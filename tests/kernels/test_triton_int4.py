"""The Triton operations on 4-bit pages against the reference: every byte that is stored, and what is read."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.kernels.by_device import reference, triton
from tests.kernels.cache import PagedCache
from tests.kernels.interpreter import DEVICE, DTYPES, TOLERANCE, on_device
from tests.kernels.test_operations import STEPS_WITH_DRAFTS, run_steps
from vllm_quest.formats.int4 import Int4Cache
from vllm_quest.page import Pages

# The interpreter computes masked lanes too, and numpy warns of what it finds there.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

# dtype, page size, head size, KV heads, group, bounds, groups of V
CONFIGURATIONS = [
    (DTYPES[-1], 8, 64, 2, 4, "int8", None),
    (DTYPES[0], 16, 128, 1, 8, "int8", 32),
    (DTYPES[1], 32, 80, 3, 1, "bfloat16", None),
    (DTYPES[0], 64, 96, 2, 3, "bfloat16", 32),
    (DTYPES[0], 16, 96, 1, 16, "int8", 64),  # 48 channels of V in a group
]
EVERY_CONFIGURATION = pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)


def new_cache(configuration: tuple, seed: int = 0) -> PagedCache:
    dtype, page_size, head_size, heads, _, bounds, group_size = configuration
    return PagedCache(
        num_blocks=24,
        num_kv_heads=heads,
        block_size=64,
        page_size=page_size,
        head_size=head_size,
        dtype=dtype,
        for_cpu=False,
        seed=seed,
        kv_dtype="int4",
        bounds_dtype=bounds,
        value_group_size=group_size,
    )


def bytes_of(views: Pages) -> torch.Tensor:
    """Every stored byte of an int4 cache, except that zeros have no sign."""
    parts = [*views.cache.key[:2], *views.cache.value, *views.summary]
    return torch.cat(
        [
            (part + 0.0 if part.is_floating_point() else part).contiguous().view(torch.uint8).flatten()
            for part in parts
            if part is not None
        ]
    )


def store_into(cache: PagedCache):
    """`triton.store` for `cache`, compared with the reference: to the bit, where no GPU fuses operations."""

    def store(key, value, pages, slot_mapping) -> None:
        expected, written = cache.cache.clone(), cache.cache.to(DEVICE)
        views = cache.layout.views(expected)
        reference.store(key, value, views, slot_mapping)
        on_gpu = cache.layout.views(written)
        triton.store(*on_device(key, value), on_gpu, slot_mapping.to(DEVICE))
        cache.cache.copy_(written)
        different = bytes_of(cache.pages) != bytes_of(views)
        if DEVICE.type == "cpu":
            assert not different.any()
        else:  # codes at a tie
            assert different.float().mean() < 1e-3

    return store


@EVERY_CONFIGURATION
@pytest.mark.parametrize("spread", [0, 512], ids=["programs of many tokens", "programs of one token"])
def test_store_writes_the_references_bytes(configuration, spread, monkeypatch) -> None:
    monkeypatch.setattr(import_module("vllm_quest.formats.int4.triton.store"), "SPREAD_TOKENS", spread)
    cache = new_cache(configuration)
    store = store_into(cache)
    first, second, third = (cache.new_request() for _ in range(3))
    cache.append(store, {first: 75, second: 17}, padding=3)
    cache.append(store, {first: 1, second: 66, third: 5})  # chunks begin inside a page, and cross blocks
    for _ in range(2):
        cache.append(store, {first: 1, second: 1, third: 1}, padding=2)
    grown = torch.full((1, configuration[3], configuration[2]), 50.0, dtype=configuration[0])
    cache.append(store, {third: 1}, key=grown)  # the range grows


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(steps=STEPS_WITH_DRAFTS)
def test_any_schedule(steps) -> None:
    cache = new_cache((DTYPES[-1], 8, 16, 1, 1, "int8", None))
    run_steps(cache, store_into(cache), steps)


@pytest.mark.parametrize(
    ("dtype", "everywhere", "element"),
    [
        *[(DTYPES[-1], True, element) for element in (0.0, 1e-37, torch.inf, -torch.inf)],
        *[(DTYPES[0], False, element) for element in (torch.inf, -torch.inf, 3e38)],
        (torch.float16, False, 65504.0),  # whose bound and zero point are beyond float16
    ],
)
def test_extreme_elements(dtype, everywhere, element) -> None:
    """Everywhere, and as an outlier; what is stored is read as the reference reads it, and finite."""
    cache = new_cache((dtype, 8, 32, 1, 2, "int8", None))
    key = torch.randn(11, 1, 32, generator=torch.Generator().manual_seed(4)).to(dtype)
    key[slice(None) if everywhere else 9] = element

    def store(key, value, *rest) -> None:
        store_into(cache)(key, key, *rest)

    request = cache.new_request()
    for part in key.split([6, 5]):
        cache.append(store, {request: len(part)}, key=part)
    # A query so small that its products are finite; sums over several of the largest numbers never are.
    query = torch.full((1, 2, 32), 2.0**-20 if dtype == torch.float16 else 2.0**-120).to(dtype)
    table, seq_lens, _ = cache.rows([request])
    assert_attends(cache, query, table, seq_lens.clamp(max=1) if everywhere else seq_lens, None)


LENGTHS = [330, 1, 17, 63]


@pytest.fixture(params=CONFIGURATIONS, ids=str)
def case(request):
    """Four requests in scattered blocks, everything unwritten poison; their rows; a query."""
    dtype, _, head_size, heads, group, _, _ = request.param
    cache = new_cache(request.param)
    requests = [cache.new_request() for _ in LENGTHS]
    cache.append(reference.store, {r: n // 2 for r, n in zip(requests, LENGTHS, strict=True)}, padding=2)
    cache.append(reference.store, {r: n - n // 2 for r, n in zip(requests, LENGTHS, strict=True)})
    query = torch.from_numpy(cache.rng.standard_normal((len(LENGTHS), heads * group, head_size))).to(dtype)
    return cache, cache.rows(requests), query


def selected(
    cache: PagedCache, query: torch.Tensor, table: torch.Tensor, num_pages: torch.Tensor, budget: int
):
    scores = reference.score_pages(query, cache.pages.summary, table, num_pages, 1.0, "max")
    return reference.select_pages(scores, num_pages, budget, 1, 2)


def assert_attends(cache, query, table, seq_lens, indices, **kwargs) -> None:
    size, scale = cache.layout.block.page_size, cache.layout.block.head_size**-0.5
    expected = reference.attend_pages(
        query, cache.pages.cache, table, seq_lens, indices, size, scale, **kwargs
    )
    views = cache.layout.views(cache.cache.to(DEVICE))
    arguments = on_device(query, views.cache, table, seq_lens, indices)
    actual = triton.attend_pages(*arguments, size, scale, **kwargs).cpu()
    bound = TOLERANCE[query.dtype]
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("budget", [3, 5, None])
def test_attention_is_the_references(case, budget) -> None:
    cache, (table, seq_lens, num_pages), query = case
    indices = None if budget is None else selected(cache, query, table, num_pages, budget)
    assert_attends(cache, query, table, seq_lens, indices)
    if budget == 3:
        assert_attends(cache, query, table, seq_lens, indices, sparse_context=100)


def test_dequantized_blocks_are_the_references(case) -> None:
    cache, _, query = case
    _, heads, size, _ = cache.cache.shape
    context = cache.requests[0]
    blocks = torch.tensor(context.blocks, dtype=torch.int32)
    wanted = (len(context.keys) - torch.arange(len(blocks)) * size).clamp(0, size).int()
    wanted[1], wanted[2] = 0, size // 2 - 1
    outputs = []
    for ops in (triton, reference):
        device = DEVICE if ops is triton else torch.device("cpu")
        views = cache.layout.views(cache.cache.to(device))
        shape = (len(blocks) + 1, heads, size, 2 * query.shape[2])
        out = torch.full(shape, torch.nan, dtype=query.dtype, device=device)
        arguments = (tensor.to(device) for tensor in (blocks, wanted))
        ops.dequantize_blocks(views.cache, *arguments, *out.chunk(2, -1))
        outputs.append(out.cpu())
    exact = DEVICE.type == "cpu" and query.dtype != torch.bfloat16  # to which the interpreter rounds its way
    bound = 0 if exact else TOLERANCE[query.dtype]
    # A GPU fuses product and sum: float32 rounds once less, at the size of the zero point, here up to 4.
    fused = 0 if DEVICE.type == "cpu" else 2**-21
    torch.testing.assert_close(*outputs, rtol=bound, atol=fused, equal_nan=True)
    assert outputs[0][:-1].isfinite().all()
    assert outputs[0][-1].isnan().all()


def test_rows_without_a_context_are_zero() -> None:
    """Padding rows of a CUDA graph: garbage in the block table, and behind it."""
    cache = new_cache(CONFIGURATIONS[0])
    request = cache.new_request()
    cache.append(reference.store, {request: 20})
    table, seq_lens, _ = cache.rows([request, request])
    table[0], seq_lens[0] = 2**30, 0
    query = torch.randn(2, 8, 64).to(cache.layout.block.dtype)
    views = cache.layout.views(cache.cache.to(DEVICE))
    arguments = on_device(query, views.cache, table, seq_lens, None)
    out = torch.full_like(query, torch.nan, device=DEVICE)
    assert not triton.attend_pages(*arguments, 8, 0.1, out=out)[0].any()
    assert_attends(cache, query[1:], table[1:], seq_lens[1:], None)


def test_a_value_threshold_drops_what_hardly_counts(case) -> None:
    cache, (table, seq_lens, _), query = case
    arguments = (cache, query, table, seq_lens, None)
    assert_attends(*arguments, value_threshold=30.0)
    # What a split drops depends on what it has met so far.
    with pytest.raises(AssertionError, match="not close"):
        assert_attends(*arguments, value_threshold=0.5)


def test_what_the_kernels_rely_on_is_checked() -> None:
    cache = new_cache(CONFIGURATIONS[0])
    key, value = cache.pages.cache
    out = torch.zeros(1, 2, 64, 128).chunk(2, -1)
    block = torch.zeros(1, dtype=torch.int32)
    channel_major = key._replace(codes=key.codes.mT.contiguous().mT)
    apart = value._replace(params=value.params.contiguous())
    for pages, blocks, message in [
        (Int4Cache(channel_major, value), block, "key_cache: .* token-major pages"),
        (Int4Cache(key, apart), block, r"value_cache\.params: "),
        (Int4Cache(key, value), block.long(), "blocks, num_tokens: torch.int64"),
    ]:
        with pytest.raises(ValueError, match=message):
            triton.dequantize_blocks(pages, blocks, block, *out)
    table = block[None]
    with pytest.raises(ValueError, match="page_size: 16; the cache has pages of 8 tokens"):
        triton.attend_pages(torch.zeros(1, 2, 64), cache.pages.cache, table, block, None, 16, 1.0)
