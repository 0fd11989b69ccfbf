"""What only a worker knows: its attention's time and backend, and its memory. The same for every backend."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch

from vllm_quest.tune.worker import MeasuredWorker


class AttentionTimer(MeasuredWorker):
    """Methods that vLLM adds to its worker when started with ``worker_extension_cls``.

    Times what a layer's attention does in decode steps, by hooks of the module: storing K and V, and
    attending. Only for ``enforce_eager=True``: a captured CUDA graph does not call Python.
    """

    attention_seconds: float
    timed_rows: int

    def start_attention_timer(self, rows: int = 1) -> None:
        """Starts timing steps of `rows` tokens, at 0 seconds."""
        self.attention_seconds, self.timed_rows = 0.0, rows
        self._hooks = [
            handle
            for layer in self._attention_layers()
            for handle in (
                layer.register_forward_pre_hook(self._before),
                layer.register_forward_hook(self._after),
            )
        ]

    def stop_attention_timer(self) -> float:
        """Stops timing; the seconds so far, all layers together."""
        for handle in self._hooks:
            handle.remove()
        return self.attention_seconds

    def attention_backends(self) -> list[str]:
        """Names of the backends that the layers run: vLLM may choose another than it was asked for."""
        return sorted({layer.get_attn_backend().get_name() for layer in self._attention_layers()})

    def weight_bytes_per_step(self) -> int:
        """What one step reads of the model: all weights, but of an embedding table of its own only a row."""
        model = self.model_runner.model
        tied = model.config.tie_word_embeddings
        return sum(w.nbytes for name, w in model.named_parameters() if tied or "embed_tokens" not in name)

    def peak_memory_bytes(self) -> int:
        """Device memory at its highest so far; on CPUs that of the process."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def _attention_layers(self) -> list[Any]:
        from vllm.config import get_layers_from_vllm_config
        from vllm.model_executor.layers.attention import Attention

        return list(get_layers_from_vllm_config(self.vllm_config, Attention).values())

    def _before(self, layer: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if len(arguments[0]) == self.timed_rows:
            _synchronize()
            self._started = time.perf_counter()

    def _after(self, layer: torch.nn.Module, arguments: tuple[torch.Tensor, ...], output: Any) -> None:
        if len(arguments[0]) == self.timed_rows:
            _synchronize()
            self.attention_seconds += time.perf_counter() - self._started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
