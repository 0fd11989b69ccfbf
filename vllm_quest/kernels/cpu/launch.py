"""What every launcher needs: numba's threads, the checks of its arguments, and the options of a kernel.

A kernel is the closure that a cached factory returns: the constants of one configuration are its free
variables, so its loops have fixed trip counts, and numba keeps its machine code on disk for the next process.
Kernels take addresses, and strides in elements, as integers, one by one: numba asks Python for the type of
every named tuple at each launch, and a few of them cost several times what the launch itself does. Work is
cut into items that the threads take from a shared counter.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numba
import numpy as np
import torch

from vllm_quest.kernels.bounds import PageBounds

# OpenMP costs 2 us a launch here, numba's own work queue over 100 us.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]

KERNEL_OPTIONS = {"parallel": True, "cache": True, "nogil": True, "error_model": "numpy"}
CACHE_LINE = 64  # bytes; elsewhere prefetching does too little or twice the work
REGISTERS = 24  # of 32, for the tile that a loop accumulates
TILE_TOKENS = 64  # tokens between two updates of a softmax's running maximum
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
LARGEST = {name: np.float32(torch.finfo(dtype).max) for dtype, name in DTYPE_NAMES.items()}

# Every kernel holds this as a free variable. Numba's cache on disk looks at the kernel's own file only; this
# makes it notice a change of the instructions and functions that any kernel is written in, and of the
# constants that it shares with the reference.
PACKAGE = Path(__file__).parents[2]
SHARED = (
    *(
        f"kernels/cpu/{name}"
        for name in ("bounds", "elements", "memory", "rounding", "runs", "simd", "softmax")
    ),
    "kernels/bounds",
    "formats/int4/cpu/folding",
    "formats/int4/cpu/nibbles",
    "formats/int4/reference",
)
INSTRUCTIONS = hashlib.sha256(b"".join((PACKAGE / f"{name}.py").read_bytes() for name in SHARED)).hexdigest()


def use_torch_threads() -> int:
    """Gives numba as many threads as torch has and returns their number."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    if numba.get_num_threads() != threads:
        numba.set_num_threads(threads)
    return threads


def new_counter() -> np.ndarray:
    """The shared counter of one launch; hold on to it until the launch returns."""
    return np.zeros(1, np.int64)


def chunks_for_balance(items: int, threads: int, most: int) -> int:
    """Pieces that each of `items` equal parts should be cut into so that every thread is busy to the end."""
    if items % threads == 0 or items >= 8 * threads:
        return 1
    return max(1, min(most, -(-4 * threads // items)))


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` up to `limit`, at least 1."""
    return max(d for d in range(1, max(1, limit) + 1) if number % d == 0)


def addresses_of(*parts: torch.Tensor) -> tuple[int, ...]:
    """Address, stride of a block and stride of a head of each part of a cache."""
    return tuple(n for part in parts for n in (part.data_ptr(), part.stride(0), part.stride(1)))


def bound_addresses(bounds: PageBounds) -> tuple[int, ...]:
    """As `addresses_of`, of the values and of the params; 0 where there are none."""
    values, params = bounds
    return addresses_of(values, params) if params is not None else (*addresses_of(values), 0, 0, 0)


def check_floating(name: str, tensor: torch.Tensor, dims: int) -> str:
    """The dtype's name, if this is a CPU tensor of a supported dtype and number of dimensions."""
    dtype = DTYPE_NAMES.get(tensor.dtype)
    if dtype is None or not tensor.is_cpu or tensor.dim() != dims:
        raise ValueError(
            f"{name}: expected a CPU tensor of {dims} dimensions, {', '.join(DTYPE_NAMES.values())}, got "
            f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )
    return dtype


def check_integers(name: str, tensor: torch.Tensor, dtype: torch.dtype, rows: int) -> None:
    """Checks ``[rows]`` or ``[rows, ...]`` integers, contiguous in the last dimension."""
    if tensor.dtype != dtype or len(tensor) < rows or tensor.stride(-1) != 1 or not tensor.is_cpu:
        raise ValueError(
            f"{name}: expected {rows} rows of {dtype} on the CPU with a contiguous last dimension, got "
            f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
        )


def check_query(query: torch.Tensor, kv_heads: int, head_size: int) -> str:
    """The dtype's name, if this is ``[R, Hq, D]`` with contiguous heads, Hq a multiple of H."""
    dtype = check_floating("query", query, 3)
    if query.shape[1] % kv_heads or query.shape[2] != head_size or query.stride(2) != 1:
        raise ValueError(
            f"query: expected [R, a multiple of {kv_heads}, {head_size}] with contiguous heads, got "
            f"{tuple(query.shape)} with strides {query.stride()}"
        )
    return dtype


def check_caches(key_cache: torch.Tensor, value_cache: torch.Tensor) -> str:
    """The dtype's name, if K is channel-major and V is token-major, ``[B, H, N, D]`` each."""
    dtype = check_floating("key_cache", key_cache, 4)
    *_, block_size, head_size = key_cache.shape
    if key_cache.stride()[2:] != (1, block_size) or head_size % 16:
        raise ValueError(
            f"key_cache: expected channel-major blocks, strides (.., .., 1, {block_size}), of a head size "
            f"that is a multiple of 16, got {tuple(key_cache.shape)} with strides {key_cache.stride()}"
        )
    if (
        value_cache.dtype != key_cache.dtype
        or value_cache.shape != key_cache.shape
        or value_cache.stride()[2:] != (head_size, 1)
    ):
        raise ValueError(
            f"value_cache: expected token-major blocks {tuple(key_cache.shape)} {key_cache.dtype}, got "
            f"{tuple(value_cache.shape)} {value_cache.dtype} with strides {value_cache.stride()}"
        )
    return dtype


def check_new_tokens(
    key: torch.Tensor,
    value: torch.Tensor,
    tokens: int,
    kv_heads: int,
    head_size: int,
    dtype: str | None = None,
) -> str:
    """The dtype's name, if both are ``[T, H, D]`` of this dtype, or of any one, with contiguous heads."""
    dtype = dtype or check_floating("key", key, 3)
    for name, tensor in (("key", key), ("value", value)):
        if (
            check_floating(name, tensor, 3) != dtype
            or len(tensor) < tokens
            or tensor.shape[1:] != (kv_heads, head_size)
            or tensor.stride(2) != 1
        ):
            raise ValueError(
                f"{name}: expected [{tokens}, {kv_heads}, {head_size}] {dtype}, heads contiguous, got "
                f"{tuple(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}"
            )
    return dtype


def check_bounds(bounds: PageBounds, head_size: int) -> str:
    """The dtype's name, if values are ``[B, H, P, 2, D]`` with contiguous ``[P, 2, D]``, params likewise."""
    values, params = bounds
    if params is None:
        dtype = check_floating("bounds", values, 5)
    elif values.dim() != 5 or values.dtype != torch.uint8 or not values.is_cpu:
        raise ValueError(
            f"bounds: expected codes [B, H, P, 2, D] of torch.uint8 on the CPU beside offsets and scales, "
            f"got {tuple(values.shape)} {values.dtype} on {values.device}"
        )
    else:
        dtype = "uint8"
        if (
            params.dtype != torch.float32
            or params.shape != (*values.shape[:3], 2)
            or params.stride()[2:] != (2, 1)
        ):
            raise ValueError(
                f"bounds: expected offsets and scales [B, H, P, 2] of torch.float32 with contiguous [P, 2], "
                f"got {tuple(params.shape)} {params.dtype} with strides {params.stride()}"
            )
    if (
        values.shape[3:] != (2, head_size)
        or values.stride()[2:] != (2 * head_size, head_size, 1)
        or head_size % 16
    ):
        raise ValueError(
            f"bounds: expected [B, H, P, 2, {head_size}] with contiguous [P, 2, D] and a head size that is a "
            f"multiple of 16, got {tuple(values.shape)} with strides {values.stride()}"
        )
    return dtype
