"""Would bounds over groups of pages save reads, where exactly the same pages must be selected?

    python -m benchmarks.kernels.second_level [--tokens 6144] [--page-size 16] [--budgets 16 64 256]
        [--groups 4 8 16]

Measured on real keys and queries. A group's bound is the minimum and maximum over its pages, so no page in it
scores higher. To select exactly the flat K best, the page bounds of every group that scores at least the K-th
best page must be read. That share, plus the groups' own bounds, is printed as a share of what flat scoring
reads: no algorithm reads less, as it would have to know the K-th best score from the start.
"""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import torch

from benchmarks.common.arguments import command_line
from benchmarks.common.tables import table
from tools.small_model import prepare_model

QUERIES = 32


def keys_and_queries(tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of every layer, after rotation: K ``[H, tokens, D]`` and the last queries ``[QUERIES, H, G, D]``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    folder = prepare_model()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = AutoTokenizer.from_pretrained(folder)(text[: 8 * tokens], return_tensors="pt").input_ids[:, :tokens]
    projected: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda _, __, out: projected.append(out[0, -QUERIES:]))
    cache: Any = DynamicCache()
    with torch.inference_mode():
        model.model(ids, past_key_values=cache, use_cache=True)
        positions = torch.arange(tokens - QUERIES, tokens)[None]
        cos, sin = model.model.rotary_emb(projected[0], positions)
        layers = []
        for queries, layer in zip(projected, cache.layers, strict=True):
            keys = layer.keys[0]
            heads = queries.view(QUERIES, -1, keys.shape[-1]).transpose(0, 1)[None]
            rotated, _ = apply_rotary_pos_emb(heads, heads, cos, sin)
            layers.append((keys, rotated[0].transpose(0, 1).unflatten(1, (len(keys), -1))))
    return layers


def group_scores(queries: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor) -> torch.Tensor:
    """QUEST's bound, maximum over the query heads of a KV head: ``[QUERIES, H, bounds]``."""
    positive, negative = queries.clamp(min=0), queries.clamp(max=0)
    scores = torch.einsum("qhgd,hpd->qhgp", positive, kmax) + torch.einsum("qhgd,hpd->qhgp", negative, kmin)
    return scores.amax(2)


def share_read(keys: torch.Tensor, queries: torch.Tensor, page_size: int, pages: int, group: int) -> float:
    """Bounds that two levels must read, as a share of those that flat scoring reads.

    Args:
        keys: ``[H, T, D]``.
        queries: ``[Q, H, G, D]``.
        page_size: Tokens per page.
        pages: K, the pages that are selected.
        group: Pages per group.
    """
    whole = keys.shape[1] // (page_size * group) * page_size * group
    paged = keys[:, :whole].unflatten(1, (-1, page_size))
    kmin, kmax = paged.amin(2), paged.amax(2)
    scores = group_scores(queries, kmin, kmax)
    threshold = scores.topk(pages, dim=-1).values[..., -1:]
    coarse = group_scores(
        queries, kmin.unflatten(1, (-1, group)).amin(2), kmax.unflatten(1, (-1, group)).amax(2)
    )
    return 1 / group + (coarse >= threshold).float().mean().item()


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--budgets", type=int, nargs="+", default=[16, 32, 64, 256, 1024])
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 8, 16])
    arguments = parser.parse_args()
    layers = keys_and_queries(arguments.tokens)[2:]  # QUEST leaves the first two dense
    rows = []
    for budget in arguments.budgets:
        pages = budget // arguments.page_size
        for group in arguments.groups:
            shares = [share_read(*layer, arguments.page_size, pages, group) for layer in layers]
            part = pages * arguments.page_size / arguments.tokens
            mean = sum(shares) / len(shares)
            cells = [f"{share:.2f}" for share in (mean, min(shares), max(shares))]
            rows.append([str(budget), f"{100 * part:.1f} %", str(group), *cells])
    columns = ("budget", "of context", "pages per group", "bounds read, of flat", "least layer", "most")
    print(table(columns, rows))


if __name__ == "__main__":
    main()
