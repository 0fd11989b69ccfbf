"""Everything we know about vLLM's versions. Each entry: symptom, what changed upstream, when to delete it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum


def register_backend(name: str, path: str) -> None:
    """Registers an attention backend under its own name so that every process of vLLM understands it.

    Symptom: with vLLM's ``register_backend`` alone a spawned engine process dies with "'path' is not
    a valid AttentionBackendEnum": enum members are pickled by value, and the value is looked up before
    plugins load. Upstream: the same in 0.32 and 0.33. Delete: when a registered member survives ``pickle``
    into a fresh process (tests/test_registration.py starts one).
    """
    from vllm.v1.attention.backends import registry

    if name in registry.AttentionBackendEnum.__members__:
        return
    registry.register_backend(name, path)
    member: Any = registry.AttentionBackendEnum[name]
    member.__reduce_ex__ = lambda protocol: (_registered_member, (name, path))


def _registered_member(name: str, path: str) -> AttentionBackendEnum:
    """What a pickled member becomes in another process: registered there first, then looked up."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register_backend(name, path)
    return AttentionBackendEnum[name]


def register_kv_cache_dtype(name: str) -> None:
    """Makes ``--kv-cache-dtype NAME`` valid, for a cache of bytes, where vLLM accepts new names.

    Symptom: 0.32 checks the flag against a fixed list. Upstream: 0.33 has ``register_kv_cache_dtype``. Delete
    the probe: with support for 0.32. The mode is ``NONE`` although the cache is quantized: ``CUSTOM`` has the
    value of ``OCTAVE_K3V4`` in 0.33.0, and vLLM would treat the cache as Octave's.
    """
    from vllm.config import cache

    register = getattr(cache, "register_kv_cache_dtype", None)
    if register is None or name in cache.KV_CACHE_DTYPES:
        return
    import torch
    from vllm.v1.kv_cache_interface import KVQuantMode

    class Handler:
        """What vLLM asks about the dtype."""

        def torch_dtype(self) -> torch.dtype:
            return torch.uint8

        def quant_mode(self) -> KVQuantMode:
            return KVQuantMode.NONE

    Handler.name = name  # type: ignore[attr-defined]
    register(name)(Handler)


def prefer_v1_model_runner() -> None:
    """Engines started from now on have the V1 model runner, unless the environment says otherwise.

    Symptom: on a GPU an engine with a logits processor of ours dies with "ForcedTokens is not a subclass of
    vllm.v1.worker.gpu.sample.logits_processor.LogitsProcessor". Upstream: 0.32 and 0.33 run GPUs with the V2
    model runner, whose logits processors have another interface; CPUs run the V1 model runner. Delete: when
    both have the same interface, or `ForcedTokens` has that of V2.
    """
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")


@contextmanager
def llvmlite_hidden() -> Iterator[None]:
    """Hides llvmlite's library object while vLLM scans all modules for Triton kernels.

    Symptom: a CPU engine that starts in a process where numba is imported, a second engine with QUEST for
    one, dies with "'_lib_fn_wrapper' object has no attribute 'get'": the scan takes ``vars()`` of every
    object, and llvmlite's lazy library has an answer to any name. Upstream: the same in 0.32 and 0.33.
    Delete: when tests/engine/test_startup.py passes without it.
    """
    name = "llvmlite.binding.ffi"
    hidden = sys.modules.pop(name, None)
    try:
        yield
    finally:
        if hidden is not None:
            sys.modules[name] = hidden
