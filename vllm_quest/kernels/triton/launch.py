"""How each kernel is launched: one small table, the number of splits, and what the arguments must be.

Nothing is tuned at run time: a CUDA graph must hold the same kernels that were compiled and tested.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_quest.formats.int4 import Int4Keys, Int4Values
from vllm_quest.kernels.bounds import PageBounds
from vllm_quest.kernels.triton.structs import DOT_ROWS, Int4Pages, Int4Shape

__all__ = [
    "CHUNK",
    "SPLIT_TOKENS",
    "Choice",
    "Int4Parts",
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
        pairs: Rows times KV heads.
        tiles: Least shares of the longest context that the shapes allow.
        device: Where the kernel runs.
    """
    filling = PROGRAMS_PER_MULTIPROCESSOR[kernel] * multiprocessors(device) // pairs
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


class Int4Parts(NamedTuple):
    """The checked parts of 4-bit pages, of the same runs, whose strides they share."""

    key: torch.Tensor  # codes of K
    key_residual: torch.Tensor
    value: torch.Tensor  # codes of V
    value_params: torch.Tensor  # ``[B, H, N, G]`` int32: zero point and scale in one word
    value_residual: torch.Tensor
    bounds: torch.Tensor
    bound_params: torch.Tensor | None
    stride_block: int  # in units of 16 bytes, and so that the compiler knows of the alignment
    stride_kv_head: int
    num_kv_heads: int
    block_size: int
    page_size: int
    head_size: int

    @property
    def shape(self) -> Int4Shape:
        """What every kernel is specialized for."""
        groups = self.value_params.shape[3]
        return Int4Shape(
            HEAD_SIZE=self.head_size,
            HEAD_PAD=triton.next_power_of_2(self.head_size),
            GROUPS=groups,
            GROUPS_PAD=triton.next_power_of_2(groups),
            CHANNELS_PAD=triton.next_power_of_2(self.head_size // groups),
            BLOCK_SIZE=self.block_size,
            PAGE_SIZE=self.page_size,
        )

    @property
    def pages(self) -> Int4Pages:
        """As the kernels that work on bytes are given them."""
        return Int4Pages(*self[:7], self.stride_block, self.stride_kv_head)

    @property
    def words(self) -> Int4Pages:
        """As attention is given them: two channels at a time, but for bounds that are no codes."""
        pair = torch.uint16
        return Int4Pages(
            self.key.view(pair),
            self.key_residual.view(pair),
            self.value.view(pair),
            self.value_params,
            self.value_residual.view(pair),
            self.bounds.view(torch.int32 if self.bound_params is None else pair),
            self.bound_params,
            self.stride_block,
            self.stride_kv_head,
        )

    @classmethod
    def of(cls, key_cache: Int4Keys, value_cache: Int4Values) -> "Int4Parts":
        """The parts of a cache.

        Raises:
            ValueError: They do not lie as a token-major `PageLayout` puts them.
        """
        codes, bounds = key_cache.codes, key_cache.bounds
        blocks, heads, pages, half, dim = codes.shape
        groups = value_cache.params.shape[3]
        if not 16 <= dim <= 256 or dim % 16:
            raise ValueError(f"head_size: {dim}; allowed for 4-bit pages: multiples of 16 up to 256")
        if half < 4 or half & (half - 1):
            raise ValueError(f"page_size: {2 * half}; allowed: a power of two, at least 8")
        rows = ((half, dim), (dim, 1))
        expected = {
            "key_cache": (codes, (pages, half, dim), (half * dim, dim, 1)),
            "key_cache.residual": (key_cache.residual, *rows),
            "value_cache": (value_cache.codes, (pages, half, dim), (half * dim, dim, 1)),
            "value_cache.params": (value_cache.params, (pages * 2 * half, groups, 2), (2 * groups, 2, 1)),
            "value_cache.residual": (value_cache.residual, *rows),
            "bounds": (bounds.values, (pages, 2, dim), (2 * dim, dim, 1)),
        }
        if bounds.params is not None:
            expected["bounds.params"] = (bounds.params, (pages, 2), (2, 1))
        for name, (part, shape, strides) in expected.items():
            outer = tuple(stride * part.element_size() for stride in part.stride()[:2])
            if (
                part.shape != (blocks, heads, *shape)
                or part.stride()[2:] != strides
                or outer != codes.stride()[:2]
                or any(stride % 16 for stride in outer)
            ):
                raise ValueError(
                    f"{name}: {tuple(part.shape)} with strides {part.stride()}; needed: "
                    f"{(blocks, heads, *shape)} in runs of token-major pages, each a multiple of 16 bytes"
                )
        return cls(
            key=codes,
            key_residual=key_cache.residual,
            value=value_cache.codes,
            value_params=value_cache.params.view(torch.int32).squeeze(-1),
            value_residual=value_cache.residual,
            bounds=bounds.values,
            bound_params=bounds.params,
            stride_block=codes.stride(0) // 16,
            stride_kv_head=codes.stride(1) // 16,
            num_kv_heads=heads,
            block_size=pages * 2 * half,
            page_size=2 * half,
            head_size=dim,
        )
