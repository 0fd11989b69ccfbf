"""The cut of a batch: which rows are sparse, what they see, what is left to vLLM's kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_quest.backend.rows import split_rows, token_indices
from vllm_quest.config import QuestConfig

CONFIG = QuestConfig(token_budget=64, page_size=16, min_context=0)
BLOCK = 32


def batch(requests: list[tuple[int, int, bool]], **changes) -> CommonAttentionMetadata:
    """A batch of (query_len, seq_len, is_prefilling)."""
    query_lens = torch.tensor([query for query, _, _ in requests])
    starts = torch.nn.functional.pad(query_lens.cumsum(0), (1, 0)).int()
    seq_lens = torch.tensor([seq for _, seq, _ in requests], dtype=torch.int32)
    blocks = -(-int(seq_lens.max()) // BLOCK) + 2
    fields = {
        "query_start_loc": starts,
        "query_start_loc_cpu": starts,
        "seq_lens": seq_lens,
        "num_reqs": len(requests),
        "num_actual_tokens": int(starts[-1]),
        "max_query_len": int(query_lens.max()),
        "max_seq_len": int(seq_lens.max()),
        "block_table_tensor": torch.arange(len(requests) * blocks, dtype=torch.int32).view(-1, blocks),
        "slot_mapping": torch.empty(0, dtype=torch.int64),
        "is_prefilling": torch.tensor([prefilling for _, _, prefilling in requests]),
    }
    return CommonAttentionMetadata(**(fields | changes))


def test_decode_rows_with_a_long_context_are_sparse() -> None:
    rows = split_rows(
        batch([(1, 65, False), (1, 64, False), (7, 90, True), (1, 200, False)]), CONFIG, BLOCK, 1
    )
    assert rows.sparse is not None
    assert rows.sparse.tokens.tolist() == [0, 9]
    assert rows.sparse.seq_lens.tolist() == [65, 200]
    assert rows.sparse.num_pages.tolist() == [5, 13]
    assert rows.sparse.block_table.shape == (2, 7)
    assert rows.sparse_lens.tolist() == [1, 0, 0, 1]
    assert (rows.counts.decode_rows, rows.counts.prefill_tokens) == (3, 7)
    # Four pages each; the last ones hold 1 and 8 tokens.
    assert (rows.counts.pages_read, rows.counts.tokens_read) == (8, 49 + 56)
    assert (rows.counts.pages_in_context, rows.counts.tokens_in_context) == (18, 265)


def test_the_last_token_of_a_prompt_is_prefill() -> None:
    rows = split_rows(batch([(1, 100, True)]), CONFIG, BLOCK, 1)
    assert rows.sparse is None
    assert (rows.counts.decode_rows, rows.counts.prefill_tokens) == (0, 1)


def test_without_is_prefilling_the_query_length_decides() -> None:
    rows = split_rows(batch([(1, 100, True), (2, 100, True)], is_prefilling=None), CONFIG, BLOCK, 1)
    assert rows.sparse is not None
    assert rows.sparse.tokens.tolist() == [0]
    assert rows.counts.prefill_tokens == 2


def test_each_speculated_token_is_a_row_of_its_own() -> None:
    rows = split_rows(batch([(1, 70, False), (3, 81, False), (5, 99, False)]), CONFIG, BLOCK, 3)
    assert rows.sparse is not None
    assert rows.sparse.tokens.tolist() == [0, 1, 2, 3]
    assert rows.sparse.seq_lens.tolist() == [70, 79, 80, 81]
    assert rows.sparse.num_pages.tolist() == [5, 5, 5, 6]
    assert torch.equal(rows.sparse.block_table[1], rows.sparse.block_table[3])
    assert rows.sparse_lens.tolist() == [1, 3, 0], "more tokens than a verification brings: recomputed, dense"


def test_min_context() -> None:
    config = replace(CONFIG, min_context=100)
    rows = split_rows(batch([(1, 99, False), (1, 100, False)]), config, BLOCK, 1)
    assert rows.sparse is not None
    assert rows.sparse.tokens.tolist() == [1]


def test_padding_and_non_causal_batches_have_no_sparse_rows() -> None:
    assert split_rows(batch([(0, 100, False)]), CONFIG, BLOCK, 1).sparse is None
    assert split_rows(batch([(1, 100, False)], causal=False), CONFIG, BLOCK, 1).sparse is None


@settings(deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(5, 150), st.booleans()),
        min_size=1,
        max_size=8,
    ),
    st.integers(0, 7),
)
def test_every_token_is_attended_exactly_once(requests, decode_tail) -> None:
    whole = batch(requests)
    rows = split_rows(whole, replace(CONFIG, decode_tail=decode_tail), BLOCK, 3)
    starts = whole.query_start_loc_cpu.long()
    dense = token_indices(starts[:-1], starts.diff() - rows.sparse_lens).tolist()
    sparse = rows.sparse.tokens.tolist() if rows.sparse else []
    assert sorted(dense + sparse) == list(range(whole.num_actual_tokens))
    assert rows.counts.decode_rows + rows.counts.prefill_tokens == whole.num_actual_tokens


@pytest.mark.parametrize("lens", [[1], [3, 0, 2], [0, 0, 1]])
def test_token_indices(lens) -> None:
    query_lens = torch.tensor(lens)
    starts = torch.nn.functional.pad(query_lens.cumsum(0), (1, 0))
    assert token_indices(starts[:-1], query_lens).tolist() == list(range(sum(lens)))


def test_the_tail_of_a_prompt_decodes() -> None:
    """A long chunk, one that is shorter than the tail, a decoding request, a short context."""
    config = replace(CONFIG, decode_tail=5)
    rows = split_rows(
        batch([(40, 100, True), (3, 90, True), (1, 80, False), (50, 50, True)]), config, BLOCK, 1
    )
    assert rows.sparse is not None
    assert rows.sparse_lens.tolist() == [5, 3, 1, 0]
    assert rows.sparse.tokens.tolist() == [35, 36, 37, 38, 39, 40, 41, 42, 43]
    assert rows.sparse.seq_lens.tolist() == [96, 97, 98, 99, 100, 88, 89, 90, 80]
    assert (rows.counts.decode_rows, rows.counts.prefill_tokens) == (14, 80)


@pytest.mark.parametrize(("min_context", "first"), [(0, 65), (68, 68)])
def test_each_token_of_a_tail_has_a_context_of_its_own(min_context, first) -> None:
    config = replace(CONFIG, decode_tail=20, min_context=min_context)
    rows = split_rows(batch([(70, 70, True)]), config, BLOCK, 1)
    assert rows.sparse is not None
    assert rows.sparse.seq_lens.tolist() == list(range(first, 71))
