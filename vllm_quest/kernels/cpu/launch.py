"""What every launcher needs: numba's threads, the checks of its arguments, and the options of a kernel.

A kernel is the closure that a cached factory returns: the constants of one configuration are its free
variables, so its loops have fixed trip counts, and numba keeps its machine code on disk for the next process.
Kernels take addresses, and strides in elements, as integers. Work is cut into items that the threads take
from a shared counter.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numba
import numpy as np
import torch

# OpenMP costs 2 us a launch here, numba's own work queue over 100 us.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]

KERNEL_OPTIONS = {"parallel": True, "cache": True, "nogil": True, "error_model": "numpy"}
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

# Every kernel holds this as a free variable. Numba's cache on disk looks at the kernel's own file only; this
# makes it notice a change of the instructions that the kernel is written in.
INSTRUCTIONS = hashlib.sha256(
    b"".join(Path(__file__).with_name(name).read_bytes() for name in ("elements.py", "memory.py", "simd.py"))
).hexdigest()


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


def require(condition: bool, name: str, problem: str) -> None:
    if not condition:
        raise ValueError(f"{name}: {problem}")


def check_floating(name: str, tensor: torch.Tensor, dims: int) -> str:
    """The dtype's name, if this is a CPU tensor of a supported dtype and number of dimensions."""
    require(tensor.device.type == "cpu", name, f"expected a CPU tensor, got {tensor.device}")
    require(
        tensor.dtype in DTYPE_NAMES, name, f"expected {', '.join(DTYPE_NAMES.values())}, got {tensor.dtype}"
    )
    require(tensor.dim() == dims, name, f"expected {dims} dimensions, got shape {tuple(tensor.shape)}")
    return DTYPE_NAMES[tensor.dtype]


def check_rows(name: str, tensor: torch.Tensor, dtype: torch.dtype, rows: int) -> None:
    """Checks per-row integers, ``[R]`` or ``[R, anything]``, contiguous in the last dimension."""
    require(tensor.dtype == dtype, name, f"expected {dtype}, got {tensor.dtype}")
    require(len(tensor) >= rows, name, f"expected {rows} rows, got {len(tensor)}")
    require(
        tensor.stride(-1) == 1, name, f"expected a contiguous last dimension, got strides {tensor.stride()}"
    )


def check_head_size(head_size: int) -> None:
    require(head_size % 16 == 0, "head_size", f"expected a multiple of 16, got {head_size}")


def check_key_cache(key_cache: torch.Tensor, value_cache: torch.Tensor) -> str:
    """The cache's dtype name, if K is channel-major and V is token-major, ``[B, H, N, D]`` each."""
    dtype = check_floating("key_cache", key_cache, 4)
    require(
        key_cache.stride()[2:] == (1, key_cache.shape[2]),
        "key_cache",
        f"expected channel-major blocks, strides (.., .., 1, {key_cache.shape[2]}), got {key_cache.stride()}",
    )
    require(value_cache.dtype == key_cache.dtype, "value_cache", f"expected {dtype}, got {value_cache.dtype}")
    require(
        value_cache.shape == key_cache.shape and value_cache.stride()[2:] == (value_cache.shape[3], 1),
        "value_cache",
        f"expected token-major blocks of shape {tuple(key_cache.shape)}, got {tuple(value_cache.shape)} with "
        f"strides {value_cache.stride()}",
    )
    check_head_size(key_cache.shape[3])
    return dtype
