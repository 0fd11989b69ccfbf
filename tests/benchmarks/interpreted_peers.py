"""Runs vLLM's own 4-bit kernels, as the GPU benchmark calls them, on a CPU; prints how far off they are.

A process of its own: vLLM's CPU build turns its Triton off when it is first imported, and Triton's
interpreter must be on by then.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

import torch

CONTEXT, BATCH, BLOCK_SIZE = 29, 2, 16


def attention(rows, key: torch.Tensor, value: torch.Tensor, tokens: int) -> torch.Tensor:
    """Each row's first `tokens`, by their slots ``[T, H, D]``."""
    slots = rows.block_table.long()[:, :, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)
    group = rows.query.shape[1] // key.shape[1]
    out = []
    for query, mine in zip(rows.query.float(), slots.flatten(1)[:, :tokens], strict=True):
        k, v = (kv[mine].float().repeat_interleave(group, dim=1) for kv in (key, value))
        weights = torch.softmax(torch.einsum("hd,thd->ht", query, k) * rows.scale, dim=1)
        out.append(torch.einsum("ht,thd->hd", weights, v))
    return torch.stack(out)


def hadamard(size: int) -> torch.Tensor:
    """Symmetric and orthonormal."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def half_up(numbers: torch.Tensor) -> torch.Tensor:
    """As it rounds; halves are not rare, since K and V have few bits."""
    return (numbers + 0.5).floor()


def turboquant_key(key: torch.Tensor) -> torch.Tensor:
    """Directions rotated, each element the nearest of 16 levels, and of norm 1 again; norms in float16."""
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids

    norms = key.float().norm(dim=-1, keepdim=True)
    rotated = key.float() / norms @ hadamard(64)
    levels = get_centroids(64, 4)
    nearest = levels[(rotated[..., None] - levels).abs().argmin(dim=-1)]
    return nearest / nearest.norm(dim=-1, keepdim=True) @ hadamard(64) * norms.half().float()


def turboquant_value(value: torch.Tensor) -> torch.Tensor:
    """16 steps from the smallest to the largest element; both in float16."""
    low, high = value.float().aminmax(dim=-1, keepdim=True)
    step = (high - low) / 15
    return half_up((value.float() - low) / step) * step.half().float() + low.half().float()


def errors(kind: str) -> dict[str, float]:
    """Root mean squares.

    Returns:
        Of attention over what the format keeps of K and V, of the kernel's error, and of what 4 bits cost.
    """
    from benchmarks.accuracy.studies.formats import int4_per_token_head
    from benchmarks.kernels.peers import PEERS
    from benchmarks.kernels.roofline import Geometry
    from benchmarks.kernels.steps import Rows

    torch.manual_seed(0)
    rows = Rows(Geometry(4, 2, 64), BATCH, CONTEXT, BLOCK_SIZE, device="cpu")
    kernel = PEERS[kind](rows)
    layer = kernel.new_layer()
    key, value = rows.random_kv(rows.num_blocks * BLOCK_SIZE)
    kernel.store(layer, key, value, torch.arange(len(key)))
    kernel.store(layer, rows.key, rows.value, rows.slot_mapping)
    kernel.attend(layer)
    key[rows.slot_mapping], value[rows.slot_mapping] = rows.key, rows.value
    if kind == "int4_per_token_head":
        expected = attention(rows, int4_per_token_head(key), int4_per_token_head(value), CONTEXT)
    else:
        expected = attention(rows, turboquant_key(key), turboquant_value(value), CONTEXT)
    differences = {
        "attention": expected,
        "error": rows.out.float() - expected,
        "four_bits": attention(rows, key, value, CONTEXT) - expected,
    }
    return {name: found.square().mean().sqrt().item() for name, found in differences.items()}


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))  # what vLLM looks for
    print(json.dumps({kind: errors(kind) for kind in sys.argv[1:]}))


if __name__ == "__main__":
    main()
