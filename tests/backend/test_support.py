"""What the backends answer vLLM, whatever their dense base class answers."""

from __future__ import annotations

import pytest
import torch
from vllm.platforms.interface import DeviceCapability

from tests.kernels import interpreter  # noqa: F401  must come before what imports our Triton kernels
from vllm_quest.backend.cpu import QuestCPUBackend
from vllm_quest.backend.cuda import QuestCUDABackend
from vllm_quest.backend.rocm import QuestROCmBackend

BACKENDS = [QuestCPUBackend, QuestCUDABackend, QuestROCmBackend]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "feature",
    [
        "supports_non_causal",
        "supports_sink",
        "supports_rswa",
        "supports_mm_prefix",
        "supports_dcp",
        "supports_pcp",
        "supports_batch_invariance",
        "supports_per_head_quant_scales",
        "supports_device_cpu_query_lens_mismatch",
        "is_mla",
        "is_sparse",
    ],
)
def test_no_is_no(backend, feature) -> None:
    assert getattr(backend, feature)() is False


@pytest.mark.parametrize("backend", BACKENDS)
def test_vllm_may_not_write_past_the_bounds(backend) -> None:
    assert backend.supports_kv_cache_update_bypass is False
    assert backend.forward_includes_kv_cache_update is False
    impl = backend.get_impl_cls()
    for fusion in ("rope_kvcache", "qk_norm_rope_kvcache", "qk_norm_mrope_kvcache"):
        assert getattr(impl, f"fused_{fusion}_supported")(None) is False
    assert impl.fused_output_quant_supported(None, None) is False


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"use_mla": True}, "MLA"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype must be auto"),
        ({"has_sink": True}, "attention sinks"),
        ({"attn_type": "encoder_only"}, "encoder attention"),
        ({"attn_type": "encoder_decoder"}, "cross-attention"),
        ({"use_dcp": True}, "DCP"),
        ({}, None),
    ],
)
def test_reasons(backend, changes, word) -> None:
    layer = {
        "head_size": 128,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 32,
        "use_mla": False,
        "has_sink": False,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": DeviceCapability(9, 0),
        "attn_type": "decoder",
        "has_sliding_window": True,
    }
    reasons = backend.validate_configuration(**(layer | changes))
    assert reasons == [] if word is None else word in "; ".join(reasons)


@pytest.mark.parametrize("backend", [QuestCUDABackend, QuestROCmBackend])
@pytest.mark.parametrize(("default", "preferred"), [(16, 128), (256, 256)])
def test_blocks_are_long_unless_the_user_names_their_size(backend, default, preferred) -> None:
    assert backend.get_preferred_block_size(default) == preferred
    assert backend.supports_block_size(preferred)
