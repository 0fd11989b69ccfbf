"""What int4 pages promise, whoever writes them: the error, the bounds, and nothing of a former owner."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.int4_cache import (
    BLOCK,
    DIM,
    EVERY_FORMAT,
    EVERY_IMPLEMENTATION,
    HEADS,
    new_cache,
    stored,
    write,
)
from tests.kernels.test_operations import STEPS_WITH_DRAFTS, run_steps
from vllm_quest.formats.int4.reference import dequantized, filling_pages, key_steps, unpack
from vllm_quest.kernels.bounds import read_bounds
from vllm_quest.page import Pages

RANDOM = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


def last_values(views: Pages, blocks: list[int], tokens: int, page_size: int) -> torch.Tensor:
    """V of a context's last page as attention reads it, ``[tokens in it, H, D]``."""
    table, length = torch.tensor([blocks], dtype=torch.int32), torch.tensor([tokens], dtype=torch.int32)
    _, values = filling_pages(views.cache, table, length)
    return values[0].transpose(0, 1)[: (tokens - 1) % page_size + 1]


def value_steps(views: Pages) -> torch.Tensor:
    """The step of the quantizer of V, ``[B, H, N, D]``."""
    scale = views.cache.value.params.float()[..., 1]
    return scale.repeat_interleave(DIM // scale.shape[-1], -1)


def page_errors(views: Pages, key: torch.Tensor, page_size: int) -> torch.Tensor:
    """Root mean square error of K per page and head."""
    parts = (stored(views, len(key))[0] - key).split(page_size)
    return torch.stack([part.square().mean((0, 2)).sqrt() for part in parts])


def steps_of(views: Pages, tokens: int, page_size: int) -> torch.Tensor:
    """The quantizer's step at every token, ``[T, H, D]``."""
    bounds = read_bounds(views.summary, torch.arange(len(views.summary.values)))
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
@EVERY_IMPLEMENTATION
@RANDOM
@given(
    chunks=st.lists(st.sampled_from([1, 1, 1, 1, 2, 3, 7, 8, 17]), min_size=2, max_size=30),
    kind=st.sampled_from(sorted(KEYS)),
    seed=st.integers(0, 999),
)
def test_filling_a_page_costs_little(format, ops, chunks, kind, seed) -> None:
    """A full page has at most 1.5 times the error of quantizing it at once, however it was written.

    Two tokens of a page that is still filling are its bounds themselves, without error when written at once;
    there, an element is wrong by half a step at most, and a sixteenth of that more for each time that the
    range has grown.
    """
    tokens = sum(chunks)
    noise = torch.randn(tokens, HEADS, DIM, generator=torch.Generator().manual_seed(seed))
    key = KEYS[kind](noise)
    grown, at_once = new_cache(format), new_cache(format)
    write(ops, grown.pages, key, chunks)
    write(ops, at_once.pages, key, [tokens])
    full = tokens // format[0]
    limit = 1.5 * page_errors(at_once.pages, key, format[0])[:full]
    assert (page_errors(grown.pages, key, format[0])[:full] <= limit + 1e-6 * key.abs().max()).all()
    error = (stored(grown.pages, tokens)[0] - key).abs()
    limit = (0.5 + format[0] / 32) * steps_of(grown.pages, tokens, format[0])
    assert (error <= limit + 1e-6 * key.abs().max()).all()
    values = [stored(cache.pages, tokens)[1] for cache in (grown, at_once)]
    torch.testing.assert_close(*values, rtol=0, atol=0)


@EVERY_FORMAT
@EVERY_IMPLEMENTATION
def test_no_drift_with_many_writes(format, ops) -> None:
    """The last token of a page that goes on is written two hundred times, as by drafts that are rejected."""
    cache, last = new_cache(format), format[0] - 2
    key = torch.randn(last, HEADS, DIM, generator=torch.Generator().manual_seed(1))
    write(ops, cache.pages, key, [last])
    for _ in range(200):
        write(ops, cache.pages, key.flip(0)[:1], [1], start=last)
    error = (stored(cache.pages, last)[0] - key).abs()
    assert (error <= 0.75 * steps_of(cache.pages, last, format[0]) + 1e-6).all()


@EVERY_FORMAT
@EVERY_IMPLEMENTATION
@RANDOM
@given(steps=STEPS_WITH_DRAFTS, seed=st.integers(0, 99))
def test_bounds_hold_and_errors_stay_small_under_any_history(format, ops, steps, seed) -> None:
    """Blocks change hands and drafts are rejected across pages: still, bounds are bounds of every key."""
    cache = new_cache(format, seed)
    run_steps(cache, ops.store, steps)
    keys, _ = dequantized(cache.pages.cache)  # [B, H, N, D]
    bounds = read_bounds(cache.pages.summary, torch.arange(len(keys))).repeat_interleave(format[0], 2)
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
        first = (len(context.keys) - 1) // format[0] * format[0]
        if first < 0:
            continue
        # A residual that is another page's, or older than its token, would add half a step.
        read = last_values(cache.pages, context.blocks, len(context.keys), format[0])
        place = first % BLOCK + torch.arange(len(read))
        limit = 0.55 * value_steps(cache.pages)[context.blocks[first // BLOCK], :, place].transpose(0, 1)
        written = torch.from_numpy(np.stack(context.values[first:])).float()
        assert ((read - written).abs() <= limit + 1e-6).all()


@EVERY_FORMAT
@EVERY_IMPLEMENTATION
def test_a_block_forgets_its_previous_owner(format, ops) -> None:
    reused, fresh = new_cache(format), new_cache(format)
    generator = torch.Generator().manual_seed(2)
    write(ops, reused.pages, 1000 * torch.randn(BLOCK, HEADS, DIM, generator=generator), [BLOCK])
    key = torch.randn(21, HEADS, DIM, generator=generator)
    for cache in (reused, fresh):
        write(ops, cache.pages, key, [5, 1, 14, 1])
    pages = -(-21 // format[0])
    assert torch.equal(reused.pages.cache.key.codes[0, :, :pages], fresh.pages.cache.key.codes[0, :, :pages])
    assert torch.equal(reused.pages.cache.key.residual[0], fresh.pages.cache.key.residual[0])
    assert torch.equal(reused.pages.cache.value.residual[0], fresh.pages.cache.value.residual[0])
    assert torch.equal(reused.pages.summary.values[0, :, :pages], fresh.pages.summary.values[0, :, :pages])
    assert torch.equal(stored(reused.pages, 21)[1], stored(fresh.pages, 21)[1])


@EVERY_FORMAT
@EVERY_IMPLEMENTATION
def test_the_residual_of_another_page_is_not_used(format, ops) -> None:
    """Page 0 goes on after a draft that reached into page 1, whose residual the block has."""
    cache, size = new_cache(format), format[0]
    key = torch.randn(size + 3, HEADS, DIM, generator=torch.Generator().manual_seed(3))
    write(ops, cache.pages, key, [size - 3, 6])
    residual = cache.pages.cache.key.residual[0]
    assert (residual[:, -1] >> 4 == 1).all()
    accepted = 5 * key[: size - 2]
    write(ops, cache.pages, accepted[-1:], [1], start=size - 3)
    assert (residual[:, -1] >> 4 == 0).all()
    error = (stored(cache.pages, size - 3)[0] - key[: size - 3]).abs()
    assert (error <= 1.1 * steps_of(cache.pages, size - 3, size) + 1e-6).all()
    fractions = unpack(cache.pages.cache.value.residual[0])
    assert (fractions[:, : size - 3] == 8).all()
    values = last_values(cache.pages, [0], size - 2, size)
    assert torch.equal(values[:-1], stored(cache.pages, size - 3)[1])
    limit = value_steps(cache.pages)[0, :, size - 3] / 30
    assert ((values[-1] - accepted[-1]).abs() <= limit + 1e-6).all()


@EVERY_FORMAT
@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("chunks", [[1] * 19, [3, 14, 1, 1], [19]], ids=str)
def test_values_of_the_page_being_filled_have_8_bits(format, ops, chunks) -> None:
    """From its first token to its last; of the pages before it, 4 bits are read."""
    cache, size, tokens = new_cache(format), format[0], 0
    value = torch.randn(19, HEADS, DIM, generator=torch.Generator().manual_seed(8))
    for part in value.split(chunks):
        write(ops, cache.pages, part, [len(part)], start=tokens)
        tokens += len(part)
        first = (tokens - 1) // size * size
        read = last_values(cache.pages, [0], tokens, size)
        limit = value_steps(cache.pages)[0, :, first:tokens].transpose(0, 1) / 30
        assert ((read - value[first:tokens]).abs() <= limit + 1e-6).all()
    assert not torch.equal(read, stored(cache.pages, tokens)[1][first:])


@EVERY_FORMAT
@EVERY_IMPLEMENTATION
def test_attention_reads_the_residuals_of_the_last_page(format, ops) -> None:
    """The page that is being filled has K and V of 8 bits; of 4 when a rejected draft took the residuals."""
    cache, size = new_cache(format), format[0]
    views, tokens = cache.pages, 2 * size - 1
    key, value = torch.randn(2, tokens + 2, HEADS, DIM, generator=torch.Generator().manual_seed(6))
    query = torch.randn(1, HEADS, DIM, generator=torch.Generator().manual_seed(7))
    table, length = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([tokens], dtype=torch.int32)

    def store(first: int, last: int) -> None:
        slots = torch.arange(first, last)
        ops.store(key[first:last], value[first:last], views, slots)

    def outputs(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        logits = torch.einsum("hd,thd->ht", query[0], keys) * DIM**-0.5
        return torch.einsum("ht,thd->hd", logits.softmax(-1), values)

    def attend() -> torch.Tensor:
        return ops.attend_pages(query, views.cache, table, length, None, size, DIM**-0.5)[0]

    store(0, size)
    store(size, tokens)
    coarse = stored(views, tokens)
    fine = [
        torch.cat([part[:size], whole[size:tokens]]) for part, whole in zip(coarse, (key, value), strict=True)
    ]
    exact, error = outputs(*fine), (attend() - outputs(*fine)).abs().max()
    assert error < (outputs(coarse[0], fine[1]) - exact).abs().max() / 4  # without that of K
    assert error < (outputs(fine[0], coarse[1]) - exact).abs().max() / 4  # without that of V
    store(tokens, tokens + 2)
    torch.testing.assert_close(attend(), outputs(*stored(views, tokens)), rtol=1e-5, atol=1e-5)
