"""How K and V are stored. A format is a folder here and a line in `FORMATS`.

``auto`` is the model's dtype; ``int4`` is FlexGen and KIVI style. What to write for another one:
docs/extending.md. A format that is not part of the package registers itself: ``FORMATS["name"] = Format``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from vllm_quest.block import Block, Part
from vllm_quest.formats.auto import AutoFormat
from vllm_quest.formats.int4 import Int4Format

if TYPE_CHECKING:
    from vllm_quest.config import QuestConfig

__all__ = ["FORMATS", "FormatKernels", "KVFormat"]


class KVFormat(Protocol):
    """How K and V of a token are stored, and what of them is read.

    An instance is one configuration's. Everything that it is told of a block is in `Block`; where its parts
    lie is not its business (`vllm_quest.page`).

    Attributes:
        name: In ``kv_dtype``.
        page_size: Tokens per page where the user names none.
        is_dense: vLLM's dense kernels can read the cache: its only part is ``kv``, as `Block.split` cuts it.
            Otherwise prefill goes through a buffer, and all decode rows are ours.
        steps_alike: What tokens that come together store is what they would have stored one by one.
        kernels: The module of each device (or ``module:object``), as `FormatKernels`; imported when used.
    """

    name: ClassVar[str]
    page_size: ClassVar[int]
    is_dense: ClassVar[bool]
    steps_alike: ClassVar[bool]
    kernels: ClassVar[Mapping[str, str]]

    def __init__(self, config: QuestConfig) -> None:
        """Raises QuestConfigError where a field does not go with this format."""

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of the cache tensor that vLLM allocates, in a model of `dtype`."""

    def parts(self, block: Block) -> dict[str, Part]:
        """What it keeps in a (block, KV head) run, in order."""

    def cache(self, parts: Mapping[str, torch.Tensor], block: Block) -> Any:
        """Views of a layer's parts, ``[B, H, *shape]`` each: a tuple with `key` and `value`."""

    def element_bytes(self, block: Block) -> int:
        """Bytes of the elements of K and V alone, per (token, KV head)."""

    def token_bytes(self, block: Block) -> int:
        """Bytes that attention reads per (token, KV head)."""

    def page_bytes(self, block: Block) -> int:
        """Bytes that attention reads once per (selected page, KV head), beside those of its tokens."""

    def row_bytes(self, block: Block) -> int:
        """Bytes that attention reads once per (row, KV head), beside those of its pages."""


class FormatKernels(Protocol):
    """A format's operations on one device; `vllm_quest.kernels` has the letters of the shapes."""

    def store(self, key: torch.Tensor, value: torch.Tensor, cache: Any, slot_mapping: torch.Tensor) -> None:
        """Writes K and V of new tokens."""

    def attend_pages(
        self,
        query: torch.Tensor,
        cache: Any,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        page_indices: torch.Tensor | None,
        page_size: int,
        scale: float,
        *,
        sparse_context: int,
        value_threshold: float | None,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention over the selected pages."""

    def dequantize_blocks(
        self,
        cache: Any,
        blocks: torch.Tensor,
        num_tokens: torch.Tensor,
        key_out: torch.Tensor,
        value_out: torch.Tensor,
    ) -> None:
        """Writes whole blocks in the model's dtype; only where the format is not `is_dense`."""


FORMATS: dict[str, Callable[[QuestConfig], KVFormat]] = {"auto": AutoFormat, "int4": Int4Format}
