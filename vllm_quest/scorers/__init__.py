"""How pages are scored. A scorer is a folder here and a line in `SCORERS`.

``minmax`` is QUEST's. What to write for another one: docs/extending.md. A scorer that is not part of the
package registers itself: ``SCORERS["name"] = Scorer``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from vllm_quest.block import Block, Part
from vllm_quest.formats import KVFormat
from vllm_quest.scorers.minmax import MinMaxScorer

if TYPE_CHECKING:
    from vllm_quest.config import QuestConfig

__all__ = ["SCORERS", "PageScorer", "ScorerKernels"]


class PageScorer(Protocol):
    """What is kept of the keys beside them, and how it tells which pages matter to a query.

    An instance is one configuration's.

    Attributes:
        name: In ``scorer``.
        borrows: Formats whose own parts it reads; there it keeps none.
        kernels: The module of each device (or ``module:object``), as `ScorerKernels`; imported when used.
    """

    name: ClassVar[str]
    borrows: ClassVar[tuple[str, ...]]
    kernels: ClassVar[Mapping[str, str]]

    def __init__(self, config: QuestConfig) -> None:
        """Raises QuestConfigError where a field does not go with this scorer."""

    def parts(self, block: Block, kv_format: KVFormat) -> dict[str, Part]:
        """What it keeps in a (block, KV head) run: per page, or per token. Nothing where it borrows."""

    def parameters(self, layer_name: str, num_kv_heads: int, device: torch.device) -> Any:
        """What scoring needs to know of a layer on this rank; asked once. None where that is nothing."""

    def summary(self, parts: Mapping[str, torch.Tensor], cache: Any, block: Block, parameters: Any) -> Any:
        """What the kernels take: a layer's parts, ``[B, H, *shape]`` each, or what the `cache` lends.

        `parameters` are those of the layer.
        """

    def page_bytes(self, block: Block, kv_format: KVFormat) -> int:
        """Bytes that scoring reads per (page, KV head)."""

    def words(self, block: Block, kv_format: KVFormat) -> str:
        """For the start-up line: what is kept, and what it takes."""


class ScorerKernels(Protocol):
    """A scorer's operations on one device; `vllm_quest.kernels` has the letters of the shapes.

    Where one pass can write K, V and the summary, a module has it in ``STORES``, by the name of the format;
    its functions take what `summarize` and the format's `store` take together. It may also have a
    `select_pages` of its own, in place of the exact top-K.
    """

    def summarize(self, key: torch.Tensor, cache: Any, summary: Any, slot_mapping: torch.Tensor) -> None:
        """Writes what is kept of new tokens, whose K and V the cache has already."""

    def score_pages(
        self,
        query: torch.Tensor,
        summary: Any,
        block_table: torch.Tensor,
        num_pages: torch.Tensor,
        scale: float,
        group_reduce: str,
    ) -> torch.Tensor:
        """One score per page and KV head: ``[R, H, M * P]`` float32."""


SCORERS: dict[str, Callable[[QuestConfig], PageScorer]] = {"minmax": MinMaxScorer}
