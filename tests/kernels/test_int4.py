"""What int4 pages promise, whoever writes them: the error, the bounds, and nothing of a former owner."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.cache import PagedCache
from tests.kernels.conformance import STEPS_WITH_DRAFTS, new_cache, run_steps
from tests.kernels.int4_cache import (
    BLOCK,
    DIM,
    EVERY_DEVICE,
    EVERY_FORMAT,
    GROUP,
    HEADS,
    attended,
    stored,
    write,
)
from vllm_quest.formats.int4.reference import dequantized, filling_pages, key_steps, unpack
from vllm_quest.kernels.bounds import read_bounds

RANDOM = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


def last_values(cache: PagedCache, blocks: list[int], tokens: int, page_size: int) -> torch.Tensor:
    """V of a context's last page as attention reads it, ``[tokens in it, H, D]``."""
    table, length = torch.tensor([blocks], dtype=torch.int32), torch.tensor([tokens], dtype=torch.int32)
    _, values = filling_pages(cache.pages.cache, table, length)
    return values[0].transpose(0, 1)[: (tokens - 1) % page_size + 1]


def value_steps(cache: PagedCache) -> torch.Tensor:
    """The step of the quantizer of V, ``[B, H, N, D]``."""
    scale = cache.pages.cache.value.params.float()[..., 1]
    return scale.repeat_interleave(DIM // scale.shape[-1], -1)


def page_errors(cache: PagedCache, key: torch.Tensor, page_size: int) -> torch.Tensor:
    """Root mean square error of K per page and head."""
    parts = (stored(cache, len(key))[0] - key).split(page_size)
    return torch.stack([part.square().mean((0, 2)).sqrt() for part in parts])


def steps_of(cache: PagedCache, tokens: int, page_size: int) -> torch.Tensor:
    """The quantizer's step at every token, ``[T, H, D]``."""
    summary = cache.pages.summary
    bounds = read_bounds(summary, torch.arange(len(summary.values)))
    step = key_steps(bounds)[1].squeeze(-2)  # [B, H, P, D]
    return step.movedim(1, 2).flatten(0, 1).repeat_interleave(page_size, 0)[:tokens]


KEYS = {
    "normal": lambda noise: noise,
    "channels of different scale": lambda noise: noise * torch.logspace(-3, 2, DIM),
    "large offsets": lambda noise: noise + torch.linspace(-30, 30, DIM),
    "a range that grows slowly": lambda noise: noise * torch.linspace(0.1, 2, len(noise))[:, None, None],
    "a range that grows with every token": lambda noise: (
        torch.arange(1.0, len(noise) + 1)[:, None, None] + 0.1 * noise
    ),
    "a range that shrinks": lambda noise: noise * torch.linspace(2, 0.1, len(noise))[:, None, None],
}


@EVERY_FORMAT
@EVERY_DEVICE
@RANDOM
@given(
    chunks=st.lists(st.sampled_from([1, 1, 1, 1, 2, 3, 7, 8, 17]), min_size=2, max_size=30),
    kind=st.sampled_from(sorted(KEYS)),
    seed=st.integers(0, 999),
)
def test_filling_a_page_costs_little(device, entries, chunks, kind, seed) -> None:
    """A full page has at most 1.5 times the error of quantizing it at once, however it was written.

    Two tokens of a page that is still filling are its bounds themselves, without error when written at once;
    there, an element is wrong by half a step at most, and a sixteenth of that more for each time that the
    range has grown.
    """
    size = entries["page_size"]
    tokens = sum(chunks)
    noise = torch.randn(tokens, HEADS, DIM, generator=torch.Generator().manual_seed(seed))
    key = KEYS[kind](noise)
    grown, at_once = new_cache(device, entries), new_cache(device, entries)
    write(grown, key, chunks)
    write(at_once, key, [tokens])
    full = tokens // size
    limit = 1.5 * page_errors(at_once, key, size)[:full]
    assert (page_errors(grown, key, size)[:full] <= limit + 1e-6 * key.abs().max()).all()
    error = (stored(grown, tokens)[0] - key).abs()
    limit = (0.5 + size / 32) * steps_of(grown, tokens, size)
    assert (error <= limit + 1e-6 * key.abs().max()).all()
    values = [stored(cache, tokens)[1] for cache in (grown, at_once)]
    torch.testing.assert_close(*values, rtol=0, atol=0)


@EVERY_FORMAT
@EVERY_DEVICE
def test_no_drift_with_many_writes(device, entries) -> None:
    """The last token of a page that goes on is written two hundred times, as by drafts that are rejected."""
    size = entries["page_size"]
    cache, last = new_cache(device, entries), size - 2
    key = torch.randn(last, HEADS, DIM, generator=torch.Generator().manual_seed(1))
    write(cache, key, [last])
    for _ in range(200):
        write(cache, key.flip(0)[:1], [1], start=last)
    error = (stored(cache, last)[0] - key).abs()
    assert (error <= 0.75 * steps_of(cache, last, size) + 1e-6).all()


@EVERY_FORMAT
@EVERY_DEVICE
@RANDOM
@given(steps=STEPS_WITH_DRAFTS, seed=st.integers(0, 99))
def test_bounds_hold_and_errors_stay_small_under_any_history(device, entries, steps, seed) -> None:
    """Blocks change hands and drafts are rejected across pages: still, bounds are bounds of every key."""
    size = entries["page_size"]
    cache = new_cache(device, entries, seed)
    run_steps(cache, steps)
    keys, _ = dequantized(cache.pages.cache)  # [B, H, N, D]
    bounds = read_bounds(cache.pages.summary, torch.arange(len(keys))).repeat_interleave(size, 2)
    step = key_steps(bounds)[1].squeeze(-2)
    for context in cache.requests.values():
        for position, key in enumerate(context.keys):
            block, token = context.blocks[position // BLOCK], position % BLOCK
            kmin, kmax = bounds[block, :, token].unbind(1)
            key = torch.from_numpy(key)
            slack = 1e-5 * (kmax - kmin)
            assert (kmin <= key + slack).all()
            assert (kmax >= key - slack).all()
            # Half a step, and once more where a rejected draft of the next page took the residual.
            assert ((keys[block, :, token] - key).abs() <= 1.2 * step[block, :, token] + 1e-6).all()
        first = (len(context.keys) - 1) // size * size
        if first < 0:
            continue
        # A residual that is another page's, or older than its token, would add half a step.
        read = last_values(cache, context.blocks, len(context.keys), size)
        place = first % BLOCK + torch.arange(len(read))
        limit = 0.55 * value_steps(cache)[context.blocks[first // BLOCK], :, place].transpose(0, 1)
        written = torch.from_numpy(np.stack(context.values[first:])).float()
        assert ((read - written).abs() <= limit + 1e-6).all()


@EVERY_FORMAT
@EVERY_DEVICE
def test_a_block_forgets_its_previous_owner(device, entries) -> None:
    size = entries["page_size"]
    reused, fresh = new_cache(device, entries), new_cache(device, entries)
    generator = torch.Generator().manual_seed(2)
    write(reused, 1000 * torch.randn(BLOCK, HEADS, DIM, generator=generator), [BLOCK])
    key = torch.randn(21, HEADS, DIM, generator=generator)
    for cache in (reused, fresh):
        write(cache, key, [5, 1, 14, 1])
    pages = -(-21 // size)
    assert torch.equal(reused.pages.cache.key.codes[0, :, :pages], fresh.pages.cache.key.codes[0, :, :pages])
    assert torch.equal(reused.pages.cache.key.residual[0], fresh.pages.cache.key.residual[0])
    assert torch.equal(reused.pages.cache.value.residual[0], fresh.pages.cache.value.residual[0])
    assert torch.equal(reused.pages.summary.values[0, :, :pages], fresh.pages.summary.values[0, :, :pages])
    assert torch.equal(stored(reused, 21)[1], stored(fresh, 21)[1])


@EVERY_FORMAT
@EVERY_DEVICE
def test_the_residual_of_another_page_is_not_used(device, entries) -> None:
    """Page 0 goes on after a draft that reached into page 1, whose residual the block has."""
    cache, size = new_cache(device, entries), entries["page_size"]
    key = torch.randn(size + 3, HEADS, DIM, generator=torch.Generator().manual_seed(3))
    write(cache, key, [size - 3, 6])
    residual = cache.pages.cache.key.residual[0]
    assert (residual[:, -1] >> 4 == 1).all()
    accepted = 5 * key[: size - 2]
    write(cache, accepted[-1:], [1], start=size - 3)
    assert (residual[:, -1] >> 4 == 0).all()
    error = (stored(cache, size - 3)[0] - key[: size - 3]).abs()
    assert (error <= 1.1 * steps_of(cache, size - 3, size) + 1e-6).all()
    fractions = unpack(cache.pages.cache.value.residual[0])
    assert (fractions[:, : size - 3] == 8).all()
    values = last_values(cache, [0], size - 2, size)
    assert torch.equal(values[:-1], stored(cache, size - 3)[1])
    limit = value_steps(cache)[0, :, size - 3] / 30
    assert ((values[-1] - accepted[-1]).abs() <= limit + 1e-6).all()


@EVERY_FORMAT
@EVERY_DEVICE
@pytest.mark.parametrize("chunks", [[1] * 19, [3, 14, 1, 1], [19]], ids=str)
def test_values_of_the_page_being_filled_have_8_bits(device, entries, chunks) -> None:
    """From its first token to its last; of the pages before it, 4 bits are read."""
    cache, size, tokens = new_cache(device, entries), entries["page_size"], 0
    value = torch.randn(19, HEADS, DIM, generator=torch.Generator().manual_seed(8))
    for part in value.split(chunks):
        write(cache, part, [len(part)], start=tokens)
        tokens += len(part)
        first = (tokens - 1) // size * size
        read = last_values(cache, [0], tokens, size)
        limit = value_steps(cache)[0, :, first:tokens].transpose(0, 1) / 30
        assert ((read - value[first:tokens]).abs() <= limit + 1e-6).all()
    assert not torch.equal(read, stored(cache, tokens)[1][first:])


@EVERY_FORMAT
@EVERY_DEVICE
def test_attention_reads_the_residuals_of_the_last_page(device, entries) -> None:
    """The page that is being filled has K and V of 8 bits; of 4 when a rejected draft took the residuals."""
    cache, size = new_cache(device, entries), entries["page_size"]
    tokens = 2 * size - 1
    key, value = torch.randn(2, tokens + 2, HEADS, DIM, generator=torch.Generator().manual_seed(6))
    query = torch.randn(1, HEADS * GROUP, DIM, generator=torch.Generator().manual_seed(7))

    def store(first: int, last: int) -> None:
        cache.store(key[first:last], value[first:last], torch.arange(first, last))

    def outputs(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        grouped = query.view(HEADS, GROUP, DIM)
        logits = torch.einsum("hgd,thd->hgt", grouped, keys) * DIM**-0.5
        return torch.einsum("hgt,thd->hgd", logits.softmax(-1), values).flatten(0, 1)

    def attend() -> torch.Tensor:
        return attended(cache, query, tokens, DIM**-0.5)[0]

    store(0, size)
    store(size, tokens)
    coarse = stored(cache, tokens)
    fine = [
        torch.cat([part[:size], whole[size:tokens]]) for part, whole in zip(coarse, (key, value), strict=True)
    ]
    exact, error = outputs(*fine), (attend() - outputs(*fine)).abs().max()
    assert error < (outputs(coarse[0], fine[1]) - exact).abs().max() / 4  # without that of K
    assert error < (outputs(fine[0], coarse[1]) - exact).abs().max() / 4  # without that of V
    store(tokens, tokens + 2)
    torch.testing.assert_close(attend(), outputs(*stored(cache, tokens)), rtol=1e-5, atol=1e-5)
