"""Prepares the steps of the GPU backend: which rows run which kernels, and what the steps' kernels share.

Nothing here asks the GPU for a length, and what a decode step uses lies in buffers that stay where they are:
a CUDA graph can hold the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata, max_decode_query_len
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_quest.backend.counting import StepCounts
from vllm_quest.backend.layers import LayerPlan
from vllm_quest.backend.workspace import Turn, take_turns
from vllm_quest.backend.workspace import Workspace as PrefillWorkspace
from vllm_quest.config import NO_CONTEXT, QuestConfig, QuestConfigError
from vllm_quest.kernels.triton import Workspace
from vllm_quest.layout import PageLayout
from vllm_quest.metrics import CounterFile

__all__ = ["DecodeRows", "PrefillRows", "QuestGPUMetadata", "QuestGPUMetadataBuilder"]

# Entries by which vLLM may round up the width of a block table: 128 tokens of the smallest block.
MAX_BLOCK_PADDING = 8


@dataclass(frozen=True)
class DecodeRows:
    """The query tokens of decoding requests, the first of the batch; all of them run the same kernels.

    Attributes:
        block_table: ``[R, M]`` int32.
        seq_lens: ``[R]`` int32, tokens that each row may see; 0 for the padding rows of a CUDA graph.
        num_pages: ``[R]`` int32, pages in that context; 0 where the row reads all of them, and scoring and
            selection have nothing to do.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    num_pages: torch.Tensor


@dataclass(frozen=True)
class PrefillRows:
    """What one call of vLLM's kernel attends to.

    Attributes:
        tokens: Their query tokens.
        metadata: vLLM's metadata of these tokens alone.
        turn: With 4-bit pages, what has to lie in the workspace; else None.
    """

    tokens: slice
    metadata: Any
    turn: Turn | None = None


@dataclass(frozen=True)
class QuestGPUMetadata:
    """One step, for all layers of a KV group.

    Attributes:
        decode: The decode rows; None where every request prefills.
        prefill: The prefilling requests: none, all of them, or turn by turn.
        whole: The whole batch, for dense layers; None where no layer needs it, and with 4-bit pages, which
            dense layers cut as sparse ones do.
    """

    decode: DecodeRows | None
    prefill: tuple[PrefillRows, ...]
    whole: PrefillRows | None


class QuestGPUMetadataBuilder:
    """Prepares a step without asking the GPU for anything; mixed into vLLM's dense builder.

    The batch comes with the decoding requests first. All their rows run the same kernels, which know by the
    length of a row whether it selects pages or reads all of them.

    Attributes:
        dense_builder: vLLM's dense builder, as a class.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table: ClassVar[bool] = False
    dense_builder: ClassVar[type]

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        config = QuestConfig.from_vllm_config(vllm_config)
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        self.supports_draft_decode_metadata_update = False
        # A builder of its own: vLLM's keeps the schedule of its last batch in one persistent buffer. What it
        # reads is in the model's dtype.
        dense_spec = replace(kv_cache_spec, dtype=vllm_config.model_config.dtype)
        self.prefill_builder = self.dense_builder(dense_spec, layer_names, vllm_config, device)
        self.spec = kv_cache_spec
        self.max_query_len = max_decode_query_len(vllm_config)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)  # type: ignore[attr-defined]
        graph_rows = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        self.max_rows = max(vllm_config.scheduler_config.max_num_seqs * self.max_query_len, graph_rows)
        self.row_lens = torch.zeros(self.max_rows, dtype=torch.int32, device=device)
        self.row_pages = torch.zeros(self.max_rows, dtype=torch.int32, device=device)
        self.row_blocks: torch.Tensor | None = None  # of rows that are not requests: speculation
        self.counters = CounterFile()
        self.layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        self.layout = PageLayout.of(kv_cache_spec, config, vllm_config.model_config.dtype, for_cpu=False)
        storage = next(iter(self.layers.values())).impl.storage
        self.workspace = None
        if storage is not None:
            self.workspace = PrefillWorkspace(storage, self.layout, kv_cache_spec.num_kv_heads)
        max_blocks = kv_cache_spec.max_num_blocks_per_req(vllm_config, vllm_config.model_config.max_model_len)
        # vLLM rounds the width of the block table up.
        self.max_pages = (max_blocks + MAX_BLOCK_PADDING) * self.layout.pages_per_block
        self.configure(config).log(config, self.layout, kv_cache_spec.num_kv_heads)

    def configure(self, config: QuestConfig) -> LayerPlan:
        """Selects by `config` from the next step on; the cache must suit it: `QuestConfig.cache_fields`.

        A CUDA graph goes on as it was captured: only eager engines can be configured anew.
        """
        if config.decode_tail:
            raise QuestConfigError(
                "decode_tail", f"{config.decode_tail}", "0 on a GPU, where only the batch's first rows decode"
            )
        self.config = config
        self.plan = LayerPlan.of(self.layers, config)
        reads_everything = self.layout.is_int4 and bool(self.plan.dense)
        workspace = Workspace.for_decode(
            max_rows=self.max_rows,
            num_heads=next(iter(self.layers.values())).num_heads,
            num_kv_heads=self.spec.num_kv_heads,
            head_size=self.spec.head_size,
            max_pages=self.max_pages,
            budget_pages=config.budget_pages,
            page_size=config.page_size,
            group_reduce=config.group_reduce,
            min_context=NO_CONTEXT if reads_everything else config.sparse_context,
            device=self.row_lens.device,
        )
        for name, layer in self.layers.items():
            layer.impl.start(config, self.layout, self.plan.dense.get(name))
            layer.impl.workspace, layer.impl.prefill_workspace = workspace, self.workspace
        return self.plan

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> QuestGPUMetadata:
        """Prepares one step; see vLLM's base class."""
        return self._build(common_attn_metadata, fast_build, is_counted=True)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> QuestGPUMetadata:
        """As `build`, for a step that nobody asked for."""
        return self._build(common_attn_metadata, fast_build=False, is_counted=False)

    def _build(self, batch: CommonAttentionMetadata, fast_build: bool, is_counted: bool) -> QuestGPUMetadata:
        decodes, prefills, decode_tokens, _ = split_decodes_and_prefills(
            batch,
            self.reorder_batch_threshold,  # type: ignore[attr-defined]
        )
        request, after = self._rows(batch, decodes, decode_tokens)
        if is_counted:
            self._count(batch, request, after)
        prefill: tuple[PrefillRows, ...] = ()
        if prefills:
            rest = _part(batch, decodes, batch.num_reqs)
            if self.workspace is not None:
                prefill = tuple(self._through_workspace(rest, decode_tokens, self.workspace, fast_build))
            else:
                prefill_metadata = self.prefill_builder.build(0, rest, fast_build)
                prefill = (PrefillRows(slice(decode_tokens, None), prefill_metadata),)
        whole = None
        if self.plan.dense and not self.layout.is_int4:
            whole = PrefillRows(slice(None), super().build(0, batch, fast_build))  # type: ignore[misc]
        return QuestGPUMetadata(
            decode=self._decode_rows(batch, request, after) if decode_tokens else None,
            prefill=prefill,
            whole=whole,
        )

    def _through_workspace(
        self, batch: CommonAttentionMetadata, first_token: int, workspace: PrefillWorkspace, fast_build: bool
    ) -> Iterator[PrefillRows]:
        """The prefilling requests, turn by turn; their tokens begin at `first_token` of the whole batch."""
        starts = batch.query_start_loc_cpu.long()
        seq_lens = batch.seq_lens_cpu_upper_bound  # exact for prefilling requests
        if seq_lens is None:
            seq_lens = batch.seq_lens.cpu()
        query_lens = starts.diff()
        requests = query_lens.nonzero().flatten()  # the first ones: what pads a batch stands at its end
        turns = list(
            take_turns(
                requests,
                seq_lens.long()[requests],
                query_lens[requests],
                batch.block_table_tensor,
                self.layout.block_size,
                len(workspace.kv),
            )
        )
        for turn in turns:
            first, last = int(turn.requests[0]), int(turn.requests[-1]) + 1
            part = _part(batch, first, last)
            part = part.replace(block_table_tensor=turn.block_table, slot_mapping=turn.slots)
            # vLLM's builder may keep its schedule in one buffer, which the next turn would overwrite.
            metadata = self.prefill_builder.build(0, part, fast_build or len(turns) > 1)
            tokens = slice(first_token + int(starts[first]), first_token + int(starts[last]))
            yield PrefillRows(tokens, metadata, turn)

    def _rows(
        self, batch: CommonAttentionMetadata, decodes: int, decode_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's request, and how many later tokens of that request it must not see; on the host."""
        query_lens = batch.query_start_loc_cpu[: decodes + 1].diff()
        if int(query_lens.sum()) < decode_tokens:  # a CUDA graph's padding: requests of no length
            query_lens = torch.full_like(query_lens, decode_tokens // decodes)
        request = torch.arange(decodes).repeat_interleave(query_lens)
        ends = query_lens.cumsum(0)
        return request, ends[request] - 1 - torch.arange(decode_tokens)

    def _decode_rows(
        self, batch: CommonAttentionMetadata, request: torch.Tensor, after: torch.Tensor
    ) -> DecodeRows:
        rows = len(request)
        seq_lens, block_table = batch.seq_lens[:rows], batch.block_table_tensor[:rows]
        if int(after.max()):
            request, after = request.to(seq_lens.device), after.to(seq_lens.device)
            if self.row_blocks is None:
                self.row_blocks = block_table.new_zeros(self.max_rows, block_table.shape[1])
            torch.index_select(batch.block_table_tensor, 0, request, out=self.row_blocks[:rows])
            block_table = self.row_blocks[:rows]
            seq_lens = (batch.seq_lens[request] - after).clamp(min=0).int()
        self.row_lens[:rows] = seq_lens
        num_pages = (seq_lens + self.config.page_size - 1) // self.config.page_size
        self.row_pages[:rows] = num_pages.where(seq_lens >= self.config.sparse_context, 0)
        return DecodeRows(block_table, self.row_lens[:rows], self.row_pages[:rows])

    def _count(self, batch: CommonAttentionMetadata, request: torch.Tensor, after: torch.Tensor) -> None:
        """Counts the step on the host; lengths are vLLM's upper bounds, exact but for asynchronous drafts.

        The steps of a drafting model come without; they are not counted.
        """
        if batch.seq_lens_cpu_upper_bound is None:
            return
        lens = (batch.seq_lens_cpu_upper_bound[request] - after).clamp(min=0)
        prefill_tokens = int(batch.query_start_loc_cpu[-1]) - len(request)
        counts = StepCounts.of(
            self.config,
            prefill_tokens=max(prefill_tokens, 0),
            decode_rows=int((lens > 0).sum()),
            sparse_lens=lens[lens >= self.config.sparse_context],
        )
        for reason, layers in self.plan.dense_counts.items():
            counts.add_dense_layer(self.counters, reason, layers)
        counts.add_sparse_layer(self.counters, self.spec.num_kv_heads, self.layout, len(self.plan.sparse))


def _part(batch: CommonAttentionMetadata, first: int, last: int) -> CommonAttentionMetadata:
    """The requests from `first` to before `last` alone."""
    start, end = (int(batch.query_start_loc_cpu[request]) for request in (first, last))
    known = batch.seq_lens_cpu_upper_bound
    return batch.replace(
        query_start_loc=batch.query_start_loc[first : last + 1] - start,
        query_start_loc_cpu=batch.query_start_loc_cpu[first : last + 1] - start,
        seq_lens=batch.seq_lens[first:last],
        seq_lens_cpu_upper_bound=None if known is None else known[first:last],
        num_reqs=last - first,
        num_actual_tokens=end - start,
        block_table_tensor=batch.block_table_tensor[first:last],
        slot_mapping=batch.slot_mapping[start:end],
    )
