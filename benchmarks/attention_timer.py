"""Times attention inside a running engine, the same way for every backend."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class AttentionTimer:
    """Methods that vLLM adds to its worker when started with ``worker_extension_cls``.

    Times what a layer's attention does in steps that decode one token: storing K and V, and attending. Only
    for ``enforce_eager=True``: a captured CUDA graph does not call Python.
    """

    attention_seconds: float
    attention_layers: dict[str, Any]

    def start_attention_timer(self) -> None:
        """Starts timing, at 0 seconds."""
        from vllm.config import get_layers_from_vllm_config
        from vllm.model_executor.layers.attention import Attention

        self.attention_seconds = 0.0
        self.attention_layers = get_layers_from_vllm_config(self.vllm_config, Attention)  # type: ignore[attr-defined]
        for layer in self.attention_layers.values():
            for method, num_rows in (("forward", _rows_of_forward), ("do_kv_cache_update", _rows_of_update)):
                if hasattr(layer.impl, method):  # backends that store inside forward lack the second
                    setattr(layer.impl, method, self._timed(getattr(layer.impl, method), num_rows))

    def stop_attention_timer(self) -> float:
        """Stops timing; the seconds so far, all layers together."""
        for layer in self.attention_layers.values():
            for method in ("forward", "do_kv_cache_update"):
                vars(layer.impl).pop(method, None)  # the class's own method shows again
        return self.attention_seconds

    def kv_bytes_per_token(self) -> float:
        """What one token of context takes in this worker's KV cache, all layers together."""
        specs = self.get_kv_cache_spec().values()  # type: ignore[attr-defined]
        return sum(spec.page_size_bytes / spec.block_size for spec in specs)

    def _timed(self, method: Callable[..., Any], num_rows: Callable[..., int]) -> Callable[..., Any]:
        synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

        def call(*args: Any, **kwargs: Any) -> Any:
            if num_rows(*args, **kwargs) != 1:
                return method(*args, **kwargs)
            synchronize()
            start = time.perf_counter()
            result = method(*args, **kwargs)
            synchronize()
            self.attention_seconds += time.perf_counter() - start
            return result

        return call


def _rows_of_forward(layer: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    return len(query)


def _rows_of_update(layer: Any, key: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    return len(key)
