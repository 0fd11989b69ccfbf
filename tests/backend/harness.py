"""A backend without a model: its real builder and Impl over a poisoned cache, driven step by step.

vLLM's objects around them (configuration, layers) are stand-ins with the attributes that are read.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

BLOCK_SIZE, NUM_BLOCKS, MAX_REQUESTS, MAX_MODEL_LEN = 32, 50, 5, 320
HEADS, KV_HEADS, HEAD_SIZE = 6, 2, 64
SCALE = HEAD_SIZE**-0.5


class DenseImpl(AttentionImpl):
    """What vLLM's FlashAttention does with its cache, in torch."""

    def __init__(self, num_heads, head_size, scale, num_kv_heads, *unused) -> None:
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = (
            num_heads,
            head_size,
            scale,
            num_kv_heads,
        )

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping) -> None:
        key_cache, value_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        real = slot_mapping >= 0
        place = slot_mapping[real] // BLOCK_SIZE, slot_mapping[real] % BLOCK_SIZE
        key_cache[place], value_cache[place] = key[: len(real)][real], value[: len(real)][real]

    def forward(self, layer, query, key, value, kv_cache, batch, output, *_, **__):
        key_cache, value_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        starts = batch.query_start_loc.tolist()
        for request, length in enumerate(batch.seq_lens.tolist()):
            rows = slice(starts[request], starts[request + 1])
            blocks = batch.block_table_tensor[request].long()[: -(-length // BLOCK_SIZE)]
            keys, values = (
                cache[blocks].flatten(0, 1)[:length].float() for cache in (key_cache, value_cache)
            )
            size = rows.stop - rows.start
            visible = torch.ones(size, length, dtype=torch.bool).tril(length - size)
            output[rows] = torch.nn.functional.scaled_dot_product_attention(
                query[rows].float().transpose(0, 1),
                keys.transpose(0, 1),
                values.transpose(0, 1),
                attn_mask=visible,
                scale=self.scale,
                enable_gqa=True,
            ).transpose(0, 1)
        return output


class DenseBuilder(AttentionMetadataBuilder):
    """Its metadata is vLLM's own description of the batch."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> CommonAttentionMetadata:
        return common_attn_metadata


def vllm_config(quest: dict, layers: dict, speculated: int = 0) -> SimpleNamespace:
    model = SimpleNamespace(
        dtype=torch.float32, max_model_len=MAX_MODEL_LEN, use_mla=False, is_encoder_decoder=False
    )
    model.get_num_attention_heads = lambda parallel_config: HEADS
    return SimpleNamespace(
        additional_config={"quest": quest},
        model_config=model,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto", user_specified_block_size=False),
        scheduler_config=SimpleNamespace(
            max_num_seqs=MAX_REQUESTS, enable_chunked_prefill=False, long_prefill_token_threshold=0
        ),
        compilation_config=SimpleNamespace(static_forward_context=layers, max_cudagraph_capture_size=0),
        speculative_config=SimpleNamespace(num_speculative_tokens=speculated, parallel_drafting=False)
        if speculated
        else None,
    )


def inputs(tokens: int, layer: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, K and V of a step in one of the two layers."""
    random = torch.Generator().manual_seed(seed * 2 + layer)
    query = torch.randn(tokens, HEADS, HEAD_SIZE, generator=random)
    key, value = torch.randn(2, tokens, KV_HEADS, HEAD_SIZE, generator=random)
    return query, key, value


class Engine:
    """Two attention layers, requests with blocks of their own, and the batch of each step.

    What was never written is NaN, or `poison`: vLLM's CPU kernel multiplies what lies behind a context by 0.
    """

    def __init__(self, backend, quest: dict, speculated: int = 0, poison: float = torch.nan) -> None:
        self.layers: dict[str, Attention] = {}
        config = vllm_config(quest, self.layers, speculated)
        spec = FullAttentionSpec(
            block_size=BLOCK_SIZE, num_kv_heads=KV_HEADS, head_size=HEAD_SIZE, dtype=torch.float32
        )
        with set_current_vllm_config(config):
            for index in range(2):
                layer = Attention.__new__(Attention)
                torch.nn.Module.__init__(layer)
                layer.sliding_window, layer.num_heads = None, HEADS
                layer._k_scale_float = layer._v_scale_float = 1.0
                arguments = (HEADS, HEAD_SIZE, SCALE, KV_HEADS, None, None, "auto")
                layer.impl = backend.get_impl_cls()(*arguments)
                self.layers[f"model.layers.{index}.attn"] = layer
            spec = backend.customize_spec(spec)
            self.builder = backend.get_builder_cls()(spec, list(self.layers), config, torch.device("cpu"))
        shape = (NUM_BLOCKS, KV_HEADS, BLOCK_SIZE, spec.state_content_size_bytes // spec.dtype.itemsize)
        # A byte cache is full of 255: the largest codes, and NaN where floating numbers lie.
        fill = 255 if spec.dtype == torch.uint8 else poison
        self.caches = [torch.full(shape, fill, dtype=spec.dtype) for _ in self.layers]
        order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(1))
        self.tables = order.view(MAX_REQUESTS, -1).int()
        self.lengths = [0] * MAX_REQUESTS

    def step(self, work: list[tuple[int, int, bool]], seed: int) -> list[torch.Tensor]:
        """One step of (request, new tokens, still in its prompt); each layer's output ``[tokens, Hq, D]``."""
        return self.run(self.batch(work), seed)

    def batch(self, work: list[tuple[int, int, bool]]) -> CommonAttentionMetadata:
        """The batch of one step, whose tokens the requests have from now on."""
        slots = []
        for request, count, _ in work:
            positions = torch.arange(self.lengths[request], self.lengths[request] + count)
            slots.append(
                self.tables[request].long()[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
            )
            self.lengths[request] += count
        requests = [request for request, _, _ in work]
        starts = torch.tensor([0, *(count for _, count, _ in work)]).cumsum(0).int()
        seq_lens = torch.tensor([self.lengths[request] for request in requests], dtype=torch.int32)
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=seq_lens.clone(),
            num_reqs=len(work),
            num_actual_tokens=int(starts[-1]),
            max_query_len=max(count for _, count, _ in work),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=self.tables[requests],
            slot_mapping=torch.cat(slots),
            is_prefilling=torch.tensor([prompt for _, _, prompt in work]),
        )

    def run(self, batch: CommonAttentionMetadata, seed: int) -> list[torch.Tensor]:
        """Runs both layers on a batch."""
        metadata, tokens = self.builder.build(0, batch), batch.num_actual_tokens
        outputs = []
        for index, layer in enumerate(self.layers.values()):
            query, key, value = inputs(tokens, index, seed)
            output = torch.full_like(query, torch.nan)
            layer.impl.do_kv_cache_update(layer, key, value, self.caches[index], batch.slot_mapping)
            layer.impl.forward(layer, query, key, value, self.caches[index], metadata, output)
            outputs.append(output)
        return outputs

    def finish(self, request: int) -> None:
        """Its blocks go to the next request of that number, their content stays."""
        self.lengths[request] = 0
