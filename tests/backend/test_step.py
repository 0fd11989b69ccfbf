"""The cut of a batch: which rows are ours, what they see, what is left to vLLM's kernel."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.attention.backend import CommonAttentionMetadata

from tests.backend.harness import BLOCK_SIZE, Engine
from vllm_quest.backend.counting import StepCounts
from vllm_quest.backend.cpu import QuestCPUBackend, QuestCPUMetadataBuilder
from vllm_quest.backend.step import Step, joined, row_owners, token_indices

QUEST = {"token_budget": 64, "page_size": 16}


def batch(requests: list[tuple[int, int, bool]], **changes) -> CommonAttentionMetadata:
    """A batch of (query_len, seq_len, is_prefilling)."""
    query_lens = torch.tensor([query for query, _, _ in requests])
    starts = torch.nn.functional.pad(query_lens.cumsum(0), (1, 0)).int()
    seq_lens = torch.tensor([seq for _, seq, _ in requests], dtype=torch.int32)
    blocks = -(-int(seq_lens.max()) // BLOCK_SIZE) + 2
    fields = {
        "query_start_loc": starts,
        "query_start_loc_cpu": starts,
        "seq_lens": seq_lens,
        "num_reqs": len(requests),
        "num_actual_tokens": int(starts[-1]),
        "max_query_len": int(query_lens.max()),
        "max_seq_len": int(seq_lens.max()),
        "block_table_tensor": torch.arange(len(requests) * blocks, dtype=torch.int32).view(-1, blocks),
        "slot_mapping": torch.arange(int(starts[-1])),
        "is_prefilling": torch.tensor([prefilling for _, _, prefilling in requests]),
    }
    return CommonAttentionMetadata(**(fields | changes))


@cache
def builder(speculated: int = 0, **changes) -> QuestCPUMetadataBuilder:
    return Engine(QuestCPUBackend, QUEST | changes, speculated).builder


def split(
    whole: CommonAttentionMetadata, speculated: int = 0, **changes
) -> tuple[Step, list[int], StepCounts]:
    """The step, how many own tokens each request has, and what is counted."""
    one = builder(speculated, **changes)
    cut = one.cut(whole)
    counts = one.count(whole, cut)
    assert counts is not None
    return one.build(0, whole), cut.own_lens.tolist(), counts


def indices(tokens: slice | torch.Tensor, total: int) -> list[int]:
    return torch.arange(total)[tokens].tolist()


def test_decode_rows_with_a_long_context_are_sparse() -> None:
    whole = batch([(1, 65, False), (1, 64, False), (7, 90, True), (1, 200, False)])
    step, own, counts = split(whole)
    assert step.decode is not None
    assert indices(step.decode.tokens, 10) == [0, 9]
    assert step.decode.seq_lens.tolist() == [65, 200]
    assert step.decode.num_pages.tolist() == [5, 13]
    assert step.decode.block_table.shape == (2, 7)
    assert own == [1, 0, 0, 1]
    assert (counts.decode_rows, counts.prefill_tokens) == (3, 7)
    # Four pages each; the last ones hold 1 and 8 tokens.
    assert (counts.pages_read, counts.tokens_read) == (8, 49 + 56)
    assert (counts.pages_in_context, counts.tokens_in_context) == (18, 265)


def test_the_last_token_of_a_prompt_is_prefill() -> None:
    step, _, counts = split(batch([(1, 100, True)]))
    assert step.decode is None
    assert (counts.decode_rows, counts.prefill_tokens) == (0, 1)


def test_without_is_prefilling_the_query_length_decides() -> None:
    step, _, counts = split(batch([(1, 100, True), (2, 100, True)], is_prefilling=None))
    assert step.decode is not None
    assert indices(step.decode.tokens, 3) == [0]
    assert counts.prefill_tokens == 2


def test_each_speculated_token_is_a_row_of_its_own() -> None:
    step, own, _ = split(batch([(1, 70, False), (3, 81, False), (5, 99, False)]), speculated=2)
    assert step.decode is not None
    assert step.decode.tokens == slice(0, 4)
    assert step.decode.seq_lens.tolist() == [70, 79, 80, 81]
    assert step.decode.num_pages.tolist() == [5, 5, 5, 6]
    assert torch.equal(step.decode.block_table[1], step.decode.block_table[3])
    assert own == [1, 3, 0], "more tokens than a verification brings: recomputed, dense"


def test_min_context() -> None:
    step, _, _ = split(batch([(1, 99, False), (1, 100, False)]), min_context=100)
    assert step.decode is not None
    assert indices(step.decode.tokens, 2) == [1]


def test_padding_and_non_causal_batches_have_no_sparse_rows() -> None:
    assert split(batch([(0, 100, False), (2, 2, True)]))[0].decode is None
    assert split(batch([(1, 100, False)], causal=False))[0].decode is None


def test_pages_that_vllm_cannot_read_leave_it_no_decode_row() -> None:
    step, own, _ = split(batch([(1, 65, False), (1, 9, False), (7, 90, True)]), kv_dtype="int4")
    assert step.decode is not None
    assert own == [1, 1, 0]
    assert step.decode.num_pages.tolist() == [5, 0]
    assert [indices(rows.tokens, 9) for rows in step.dense] == [list(range(2, 9))]
    assert all(rows.turn is not None for rows in step.dense)


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
    step, _, counts = split(whole, speculated=2, decode_tail=decode_tail)
    total = whole.num_actual_tokens
    tokens = [indices(rows.tokens, total) for rows in step.dense]
    if step.decode is not None:
        tokens.append(indices(step.decode.tokens, total))
    assert sorted(itertools.chain(*tokens)) == list(range(total))
    assert counts.decode_rows + counts.prefill_tokens == total


@settings(deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(5, 150), st.booleans()),
        min_size=1,
        max_size=8,
    )
)
def test_the_rest_of_a_batch_sees_what_it_saw_in_it(requests) -> None:
    """Each of its tokens has the same request, by its block table, and the same place in the context."""
    whole = batch(requests)
    step, _, _ = split(whole, speculated=2)
    places = {}
    for table, start, end, length in zip(
        whole.block_table_tensor,
        whole.query_start_loc[:-1],
        whole.query_start_loc[1:],
        whole.seq_lens,
        strict=True,
    ):
        for token in range(int(start), int(end)):
            places[token] = (int(table[0]), int(length) - (int(end) - token))
    for rows in step.dense:
        found = []
        starts = rows.metadata.query_start_loc.tolist()
        for request, length in enumerate(rows.metadata.seq_lens.tolist()):
            count = starts[request + 1] - starts[request]
            first = int(rows.metadata.block_table[request, 0])
            found += [(first, length - count + i) for i in range(count)]
        assert found == [places[token] for token in indices(rows.tokens, whole.num_actual_tokens)]


@pytest.mark.parametrize("lens", [[1], [3, 0, 2], [0, 0, 1]])
def test_token_indices(lens) -> None:
    query_lens = torch.tensor(lens)
    starts = torch.nn.functional.pad(query_lens.cumsum(0), (1, 0))
    assert token_indices(starts[:-1], query_lens).tolist() == list(range(sum(lens)))


def test_rows_know_their_request_and_what_comes_after_them() -> None:
    request, after = row_owners(torch.tensor([2, 0, 3]))
    assert request.tolist() == [0, 0, 2, 2, 2]
    assert after.tolist() == [1, 0, 2, 1, 0]


def test_indices_that_follow_each_other_are_a_slice() -> None:
    assert joined(torch.tensor([3, 4, 5])) == slice(3, 6)
    tokens = torch.tensor([3, 5])
    assert joined(tokens) is tokens


def test_the_tail_of_a_prompt_decodes() -> None:
    """A long chunk, one that is shorter than the tail, a decoding request, a short context."""
    whole = batch([(40, 100, True), (3, 90, True), (1, 80, False), (50, 50, True)])
    step, own, counts = split(whole, decode_tail=5)
    assert step.decode is not None
    assert own == [5, 3, 1, 0]
    assert indices(step.decode.tokens, 94) == [35, 36, 37, 38, 39, 40, 41, 42, 43]
    assert step.decode.seq_lens.tolist() == [96, 97, 98, 99, 100, 88, 89, 90, 80]
    assert (counts.decode_rows, counts.prefill_tokens) == (14, 80)


@pytest.mark.parametrize(("min_context", "first"), [(0, 65), (68, 68)])
def test_each_token_of_a_tail_has_a_context_of_its_own(min_context, first) -> None:
    step, _, _ = split(batch([(70, 70, True)]), decode_tail=20, min_context=min_context)
    assert step.decode is not None
    assert step.decode.seq_lens.tolist() == list(range(first, 71))
