"""One decode step of one layer, as `benchmarks.kernels.gpu` times it: QUEST's launches or vLLM's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from benchmarks.kernels.dense import DENSE
from benchmarks.kernels.roofline import Geometry
from benchmarks.kernels.vllm_cache import Layer
from vllm_quest.config import QuestConfig
from vllm_quest.kernels.operations import Operations, Shapes
from vllm_quest.kernels.operations import Rows as DecodeRows
from vllm_quest.page import PageLayout, Pages

DTYPE = torch.bfloat16
FILL_TOKENS = 1 << 15


class Rows:
    """What the kernels of both sides are given, but for the cache: scattered blocks, new K, V and q."""

    def __init__(
        self, geometry: Geometry, batch: int, context: int, block_size: int, device: str = "cuda"
    ) -> None:
        self.geometry, self.block_size, self.device = geometry, block_size, device
        blocks = math.ceil(context / block_size)
        self.num_blocks = batch * blocks
        table = torch.randperm(self.num_blocks, device=device).int().view(batch, blocks)
        # An engine's table has room for more than a row's context.
        self.block_table, self.context = torch.nn.functional.pad(table, (0, 1)), context
        self.seq_lens = torch.full((batch,), context, dtype=torch.int32, device=device)
        last = (context - 1) % block_size
        self.slot_mapping = table[:, -1].long() * block_size + last
        self.starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
        self.key, self.value = self.random_kv(batch)
        self.query = torch.randn(batch, geometry.num_heads, geometry.head_size, device=device, dtype=DTYPE)
        self.out = torch.empty_like(self.query)
        self.scale = geometry.head_size**-0.5

    def random_kv(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of new tokens, ``[tokens, H, D]`` each."""
        shape = (2, tokens, self.geometry.num_kv_heads, self.geometry.head_size)
        key, value = torch.randn(shape, device=self.device, dtype=DTYPE)
        return key, value


def random_pages(rows: Rows, layout: PageLayout) -> Pages:
    """One layer's cache: random K and V, and random bounds, but kmin below kmax."""
    shape = (rows.num_blocks, rows.geometry.num_kv_heads, layout.block.block_size, layout.content_size)
    is_int4 = layout.format.name == "int4"
    if is_int4:
        cache = torch.randint(256, shape, dtype=torch.uint8, device=rows.device)
    else:
        cache = torch.empty(shape, dtype=DTYPE, device=rows.device).normal_()
    pages = layout.views(cache)
    if is_int4:
        pages.cache.value.params.copy_(torch.tensor([-1, 2 / 15]))
    bounds, params = pages.summary
    if params is not None:
        params.copy_(torch.tensor([-1, 2 / 255]))
    elif is_int4:
        bounds.normal_()
    kmin, kmax = (bound.clone() for bound in bounds.unbind(3))
    torch.minimum(kmin, kmax, out=bounds[:, :, :, 0])
    torch.maximum(kmin, kmax, out=bounds[:, :, :, 1])
    return pages


class QuestLayers:
    """Layers with QUEST's pages, and what a decode step does in them: four launches per layer, or two."""

    def __init__(self, rows: Rows, config: QuestConfig, layers: int) -> None:
        """`layers` layers of caches as `config` has them, in blocks of `rows.block_size` tokens."""
        self.rows, geometry = rows, rows.geometry
        layout = PageLayout.configured(config, rows.block_size, geometry.head_size, DTYPE, for_cpu=False)
        self.layers = [random_pages(rows, layout) for _ in range(layers)]
        num_pages = (rows.seq_lens + config.page_size - 1) // config.page_size
        num_pages *= rows.seq_lens >= config.sparse_context
        self.decode_rows = DecodeRows(rows.block_table, rows.seq_lens, num_pages)
        self.quest = Operations(
            layout,
            config,
            "triton",
            Shapes(
                num_heads=geometry.num_heads,
                num_kv_heads=geometry.num_kv_heads,
                max_rows=len(rows.query),
                max_pages=rows.block_table.shape[1] * layout.block.pages,
                reads_everything=True,  # `dense_step` does
                device=rows.query.device,
            ),
        )

    def store(self, pages: Pages) -> None:
        self.quest.store(self.rows.key, self.rows.value, pages, self.rows.slot_mapping)

    def score(self, pages: Pages) -> torch.Tensor:
        return self.quest.score_pages(self.rows.query, pages, self.decode_rows, self.rows.scale)

    def select(self, scores: torch.Tensor) -> torch.Tensor:
        return self.quest.select_pages(scores, self.decode_rows)

    def attend(self, pages: Pages, page_indices: torch.Tensor | None) -> None:
        """Attention over the selected pages; over all, where `page_indices` is None."""
        rows = self.rows
        self.quest.attend_pages(rows.query, pages, self.decode_rows, page_indices, rows.scale, rows.out)

    def step(self) -> None:
        for pages in self.layers:
            self.store(pages)
            self.attend(pages, self.select(self.score(pages)))

    def dense_step(self) -> None:
        """A step without a budget."""
        for pages in self.layers:
            self.store(pages)
            self.attend(pages, None)

    def operations(self) -> dict[str, Callable[[], object]]:
        """Each launch alone, in all layers; scores and page indices lie ready."""
        scores = [self.score(pages) for pages in self.layers]
        selected = [self.select(score) for score in scores]
        return {
            "store": _launches(self.store, self.layers),
            "score": _launches(self.score, self.layers),
            "select": _launches(self.select, scores),
            "attend": _launches(self.attend, self.layers, selected),
            "attend every page": _launches(self.attend, self.layers, [None] * len(self.layers)),
        }


def _launches(operation: Callable[..., object], *arguments: Sequence) -> Callable[[], None]:
    def launches() -> None:
        for layer in zip(*arguments, strict=True):
            operation(*layer)

    return launches


def fill(rows: Rows, store: Callable, layer: Layer) -> None:
    """Stores random K and V in every slot of a layer, by vLLM's own kernel, some tokens at a time."""
    slots = torch.arange(rows.num_blocks * rows.block_size, device=rows.device)
    for some in slots.split(FILL_TOKENS):
        store(layer, *rows.random_kv(len(some)), some)


def dense_step(rows: Rows, layers: int, kind: str) -> Callable[[], None]:
    """A step of one of vLLM's kernels, over filled caches."""
    kernel = DENSE[kind](rows)
    caches = [kernel.new_layer() for _ in range(layers)]
    for layer in caches:
        fill(rows, kernel.store, layer)

    def step() -> None:
        for layer in caches:
            kernel.store(layer, rows.key, rows.value, rows.slot_mapping)
            kernel.attend(layer)

    return step
