"""How each kernel is launched: one small table, the number of splits, and what the arguments must be.

Nothing is tuned at run time: a CUDA graph must hold the same kernels that were compiled and tested.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_quest.kernels.bounds import PageBounds
from vllm_quest.kernels.triton.structs import DOT_ROWS

__all__ = [
    "CHUNK",
    "SPLIT_TOKENS",
    "Choice",
    "check_bounds",
    "check_cache",
    "check_group",
    "choose",
    "dot_type",
    "split_count",
    "split_total",
    "takes_ptx",
    "warps_for",
]

# A program of few tiles costs little; a GPU that waits for the longest row costs much. So every row is cut
# into at least this many splits, where it has as many tiles.
MIN_SPLITS = 4
PROGRAMS_PER_MULTIPROCESSOR = {"score": 4, "attend": 3}
# A split of attention has at least this many tokens, whatever the tile: the scratch memory follows from it.
SPLIT_TOKENS = 128
# One program merges what the splits of a row found: the outputs of all splits, but only the sums of scores.
_MAX_SPLITS = {"score": 256, "attend": 32}

CHUNK = 2048  # pages that one program of the selection holds in registers

# Read once, as `triton.jit` read it when it decorated our kernels.
INTERPRETED = triton.knobs.runtime.interpret


class Choice(NamedTuple):
    """One launch configuration."""

    tile: int  # pages (score), tokens (attend) per loop iteration
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # per thread, so that more programs run at a time; NVIDIA only

    @property
    def options(self) -> dict[str, int]:
        """What a launch is given."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


# By kernel, architecture and head size (padded to a power of two). The page size does not enter: a tile is a
# number of gathered rows, whatever page each of them comes from.
_CHOICES = {
    ("score", "ampere"): {64: Choice(64, 4, 3), 128: Choice(64, 4, 2), 256: Choice(32, 4, 2)},
    ("score", "hopper"): {64: Choice(64, 4, 3), 128: Choice(64, 4, 3), 256: Choice(32, 4, 2)},
    ("score", "blackwell"): {64: Choice(64, 4, 3), 128: Choice(64, 4, 3), 256: Choice(32, 4, 2)},
    ("score", "cdna"): {64: Choice(64, 4, 2), 128: Choice(64, 4, 2), 256: Choice(32, 4, 2)},
    ("attend", "ampere"): {64: Choice(64, 4, 3), 128: Choice(64, 4, 2), 256: Choice(32, 4, 2)},
    ("attend", "hopper"): {64: Choice(64, 4, 4), 128: Choice(32, 4, 3), 256: Choice(64, 4, 2)},
    ("attend", "blackwell"): {64: Choice(64, 4, 4), 128: Choice(64, 4, 3), 256: Choice(64, 4, 2)},
    ("attend", "cdna"): {64: Choice(64, 4, 2), 128: Choice(64, 4, 2), 256: Choice(32, 4, 2)},
    # V is loaded when the tile's logits are known, into registers.
    ("attend_near", "ampere"): {64: Choice(32, 4, 3), 128: Choice(32, 4, 3), 256: Choice(32, 4, 2)},
    ("attend_near", "hopper"): {64: Choice(32, 4, 4), 128: Choice(32, 4, 4), 256: Choice(32, 8, 3)},
    ("attend_near", "blackwell"): {64: Choice(32, 4, 4), 128: Choice(32, 4, 4), 256: Choice(32, 8, 3)},
    ("attend_near", "cdna"): {64: Choice(32, 4, 1), 128: Choice(32, 4, 1), 256: Choice(32, 4, 1)},
    ("attend_int4", "ampere"): {64: Choice(64, 4, 2), 128: Choice(64, 4, 2), 256: Choice(32, 8, 2)},
    ("attend_int4", "hopper"): {64: Choice(64, 4, 4), 128: Choice(64, 4, 3, 168), 256: Choice(32, 8, 3)},
    ("attend_int4", "blackwell"): {64: Choice(64, 4, 4), 128: Choice(64, 4, 3, 168), 256: Choice(32, 8, 3)},
    ("attend_int4", "cdna"): {64: Choice(64, 2, 2), 128: Choice(64, 4, 2), 256: Choice(32, 4, 2)},
    ("attend_int4_near", "ampere"): {64: Choice(32, 4, 2), 128: Choice(32, 4, 2), 256: Choice(64, 16, 2)},
    ("attend_int4_near", "hopper"): {64: Choice(32, 4, 2), 128: Choice(32, 4, 2), 256: Choice(32, 8, 2)},
    ("attend_int4_near", "blackwell"): {64: Choice(32, 4, 2), 128: Choice(32, 4, 2), 256: Choice(32, 8, 2)},
    ("attend_int4_near", "cdna"): {64: Choice(64, 2, 2), 128: Choice(64, 4, 2), 256: Choice(32, 4, 2)},
}


@cache
def architecture(device: torch.device) -> str:
    """``ampere`` (any NVIDIA GPU with 99 KiB of shared memory), ``hopper``, ``blackwell`` or ``cdna``."""
    if device.type != "cuda":
        return "hopper"  # the interpreter runs what most users run
    if torch.version.hip:
        return "cdna"
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "hopper", 10: "blackwell", 11: "blackwell"}.get(major, "ampere")


def takes_ptx(device: torch.device) -> bool:
    """Whether kernels may have instructions of NVIDIA's own."""
    return not INTERPRETED and architecture(device) != "cdna"


def warps_for(elements: int, per_thread: int, device: torch.device) -> int:
    """Warps, 1 to 8, whose threads have `per_thread` of the elements of a tile each."""
    width = 64 if architecture(device) == "cdna" else 32
    return max(1, min(8, elements // (width * per_thread)))


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of the device; a few for the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def choose(kernel: str, head_size: int, device: torch.device) -> Choice:
    """The launch configuration of `kernel`, a key of the table.

    Raises:
        ValueError: No configuration for this head size.
    """
    if not 16 <= head_size <= 256:
        raise ValueError(f"head_size: {head_size}; allowed: 16 to 256")
    return _CHOICES[kernel, architecture(device)][max(64, triton.next_power_of_2(head_size))]


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """The type in which operands enter the tensor cores: their own, but float32 under the interpreter.

    The interpreter holds bf16 as raw integers and would multiply those.

    Raises:
        ValueError: A cache dtype that is neither compiled nor checked.
    """
    if INTERPRETED:
        return tl.float32
    types = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    if dtype not in types:
        raise ValueError(f"cache dtype: {dtype}; allowed on a GPU: {', '.join(map(str, types))}")
    return types[dtype]


def split_count(kernel: str, pairs: int, tiles: int, device: torch.device) -> int:
    """Programs per (row, KV head), from shapes alone: as many as the device runs at a time, or one per tile.

    Args:
        kernel: ``score`` or ``attend``.
        pairs: Rows times KV heads; 0 where a step has no rows.
        tiles: Least shares of the longest context that the shapes allow.
        device: Where the kernel runs.
    """
    filling = PROGRAMS_PER_MULTIPROCESSOR[kernel] * multiprocessors(device) // max(1, pairs)
    return max(1, min(tiles, _MAX_SPLITS[kernel], max(MIN_SPLITS, filling)))


def split_total(kernel: str, pairs: int, tiles: int, device: torch.device) -> int:
    """At least the splits of a launch of `pairs` pairs or fewer: fewer pairs may have more splits in all."""
    at_once = PROGRAMS_PER_MULTIPROCESSOR[kernel] * multiprocessors(device)
    return min(pairs * min(tiles, _MAX_SPLITS[kernel]), max(pairs * MIN_SPLITS, at_once))


def check_group(num_heads: int, num_kv_heads: int) -> int:
    """Query heads per KV head; ValueError where the kernels cannot pack them."""
    if num_heads % num_kv_heads or num_heads > DOT_ROWS.value * num_kv_heads:
        raise ValueError(f"query: {num_heads} heads for {num_kv_heads} KV heads; allowed: groups of 1 to 16")
    return num_heads // num_kv_heads


def check_bounds(bounds: PageBounds, head_size: int) -> None:
    """ValueError where kmin and kmax of a page do not follow each other."""
    values = bounds.values
    if values.shape[3:] != (2, head_size) or values.stride()[2:] != (2 * head_size, head_size, 1):
        raise ValueError(
            f"bounds: {tuple(values.shape)} with strides {values.stride()} is not [B, H, P, 2, D]"
        )


def check_cache(key_cache: torch.Tensor, value_cache: torch.Tensor, page_size: int) -> None:
    """ValueError where K and V do not lie as a token-major `PageLayout` puts them."""
    block_size = key_cache.shape[2]
    if page_size & (page_size - 1) or block_size % page_size:
        raise ValueError(f"page_size: {page_size}; allowed: a power of two that divides {block_size}")
    if key_cache.stride(3) != 1 or value_cache.stride() != key_cache.stride():
        raise ValueError(
            f"key_cache, value_cache: strides {key_cache.stride()} and {value_cache.stride()}; needed: the "
            f"same, and contiguous in D"
        )
