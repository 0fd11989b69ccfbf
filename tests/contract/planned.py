"""What will be relied on: an entry moves to its file's contract when that file uses it."""

from __future__ import annotations

from tests.contract.reliance import Contract, On

_BACKEND = "vllm.v1.attention.backend"
_SPEC = "vllm.v1.kv_cache_interface"

PLANNED: Contract = {
    "planned": (
        On(
            f"{_BACKEND}.AttentionMetadataBuilder",
            "drafts, and graphs of varied lengths",
            declared=(
                "update_block_table(self, metadata, blk_table, slot_mapping)",
                "update_draft_decode_metadata(self, metadata)",
                "build_for_drafting(self, common_attn_metadata, draft_index)",
                "@classmethod get_varlen_cudagraph_max_query_len(cls, vllm_config, kv_cache_spec)",
            ),
        ),
        On(
            f"{_SPEC}.AttentionSpec",
            "an int4 page",
            attributes=("kv_quant_mode",),
            fields=("dtype", "page_size_padded", "num_head_slots", "block_stride_alignment"),
        ),
    ),
}
