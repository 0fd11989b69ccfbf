"""What the compiled operations of the CPU take beyond what every device must."""

from __future__ import annotations

import torch

from tests.kernels.conformance import EVERY_LINE, EVERY_SMALL, EXACT, case_of, new_cache


@EVERY_LINE
def test_missing_pages_may_stand_anywhere(line) -> None:
    case = case_of(line, "cpu")
    # The first row's pages 0 and 2 with gaps around them, the second row's only page, nothing for the others.
    pages = torch.full((4, line.kv_heads, 40), -1, dtype=torch.int32)
    pages[0, :, 3], pages[0, :, 39], pages[1, :, 20] = 0, 2, 0
    rows = (case.query, case.table, case.seq_lens, pages)
    out = case.cache.kernels.attend_pages(*rows, case.scale)
    expected = case.cache.reference.attend_pages(*(part[:2] for part in rows), case.scale)
    torch.testing.assert_close(out[:2], expected, **case.tolerance)
    assert not out[2:].any()


@EVERY_LINE
def test_no_rows_and_no_tokens(line) -> None:
    case = case_of(line, "cpu", [17])
    cache, none = case.cache, case.query[:0]
    before = cache.cache.clone()
    cache.kernels.store(cache.random(0), cache.random(0), torch.empty(0, dtype=torch.int64))
    assert torch.equal(cache.cache.view(torch.uint8), before.view(torch.uint8))
    scores = cache.kernels.score_pages(none, case.table[:0], case.num_pages[:0], 1.0)
    pages = cache.kernels.select_pages(scores, case.num_pages[:0], 4, 1, 2)
    out = cache.kernels.attend_pages(none, case.table[:0], case.seq_lens[:0], pages, 1.0)
    assert out.shape == none.shape


@EVERY_LINE
def test_scores_behind_a_row_are_minus_infinity(line) -> None:
    case = case_of(line, "cpu")
    arguments = (case.query, case.table, case.num_pages, 0.3)
    missing = case.cache.reference.score_pages(*arguments).isinf()
    assert torch.equal(case.cache.kernels.score_pages(*arguments).isneginf(), missing)


def test_padding_within_a_page() -> None:
    cache = new_cache("cpu", EXACT | {"num_kv_heads": 3, "head_size": 112, "dtype": torch.bfloat16})
    key = cache.random(5)
    cache.store(key, key, torch.tensor([8, -1, 9, -1, 16]))
    bounds, kept = cache.pages.summary.values, key[[0, 2]]
    assert torch.equal(bounds[0, :, 1, 0], kept.amin(0))
    assert torch.equal(bounds[0, :, 1, 1], kept.amax(0))
    assert torch.equal(bounds[0, :, 2, 0], key[4])
    assert bounds[0, :, 0].isnan().all()


@EVERY_SMALL
def test_long_prompts_are_cut_into_blocks(entries) -> None:
    """Threads take whole blocks: chunks that begin inside a page, padding within a page and behind."""
    cache = new_cache("cpu", entries | {"num_blocks": 40})
    slots = torch.cat([torch.arange(19, 300), torch.tensor([-1, -1]), torch.arange(300, 1100)])
    cache.store(cache.random(20), cache.random(20), torch.arange(20))
    padded = torch.nn.functional.pad(slots, (0, 3), value=-1)
    cache.store(cache.random(len(padded)), cache.random(len(padded)), padded)


def test_a_million_tokens_of_equal_scores() -> None:
    kernels = new_cache("cpu", EXACT).kernels
    reference = new_cache("reference", EXACT).kernels
    scores, pages = torch.full((1, 1, 131072), 7.0), torch.tensor([131072], dtype=torch.int32)
    for step in (131072, 64):
        scores[..., 1000::step] = 8.0
        arguments = (scores, pages, 4096, 1, 2)
        assert torch.equal(kernels.select_pages(*arguments), reference.select_pages(*arguments))
