"""Named `quest` configurations: one factor at a time around a base, all combinations, or a user's own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from vllm_quest.config import QuestConfig, QuestConfigError

__all__ = ["by_cache", "crossed", "from_entries", "one_at_a_time", "parse_field", "standard"]

Configurations = dict[str, QuestConfig]


def standard(context: int) -> Configurations:
    """What the published tables show: each factor alone around a quarter of the context, and combinations."""
    base = QuestConfig(token_budget=_part(context, 4))
    budgets = [_part(context, share) for share in (16, 8, 2)]
    factors: dict[str, list[Any]] = {
        "token_budget": budgets,
        "page_size": [16, 32, 64],
        "group_reduce": ["mean", "softmax_mean"],
        "dense_layers": [2],
        "sink_pages": [0, 4],
        "recent_pages": [1, 8],
        "bounds_dtype": ["auto"],
        "kv_dtype": ["int4"],
    }
    tight = replace(base, token_budget=_part(context, 8))
    combined = [
        *(replace(tight, page_size=size) for size in (16, 32, 64)),
        replace(tight, dense_layers=2),
        replace(base, page_size=16, bounds_dtype="auto"),
        replace(tight, page_size=16, bounds_dtype="auto"),
        replace(base, kv_dtype="int4", token_budget=None),
        replace(base, kv_dtype="int4", token_budget=None, page_size=16),
        replace(base, kv_dtype="int4", page_size=16),
    ]
    return one_at_a_time(base, factors) | {name_of(config): config for config in combined}


def one_at_a_time(base: QuestConfig, factors: Mapping[str, Sequence[Any]]) -> Configurations:
    """`base`, and with each value of each field alone."""
    configs = [base]
    for field, values in factors.items():
        configs += [_changed(base, {field: value}) for value in values]
    return {name_of(config): config for config in configs}


def crossed(base: QuestConfig, factors: Mapping[str, Sequence[Any]]) -> Configurations:
    """`base` with every combination of the values."""
    combinations = itertools.product(*factors.values())
    configs = [_changed(base, dict(zip(factors, values, strict=True))) for values in combinations]
    return {name_of(config): config for config in configs}


def from_entries(entries: Mapping[str, Any]) -> Configurations:
    """One configuration as a user writes it."""
    config = QuestConfig.from_dict(dict(entries))
    return {name_of(config): config}


def name_of(config: QuestConfig) -> str:
    """The budget, and whatever is not QUEST's default: ``token_budget=1024 page_size=16``."""
    default = asdict(QuestConfig())
    fields = {
        field: value
        for field, value in asdict(config).items()
        if field == "token_budget" or value != default[field]
    }
    return " ".join(f"{field}={'all' if value is None else value}" for field, value in fields.items())


def by_cache(configurations: Configurations) -> list[Configurations]:
    """The same, grouped by the cache that they need: each group can share one engine."""
    groups: dict[str, Configurations] = {}
    for name, config in configurations.items():
        groups.setdefault(json.dumps(config.cache_fields), {})[name] = config
    return list(groups.values())


def parse_field(text: str) -> tuple[str, list[Any]]:
    """``FIELD=VALUE,VALUE,...``: the field and its values, JSON or bare words.

    Raises:
        QuestConfigError: No such form.
    """
    field, equals, values = text.partition("=")
    if not equals or not values:
        raise QuestConfigError(field, f"{text!r} names no value", "FIELD=VALUE,VALUE,...")
    return field, [_value(value) for value in values.split(",")]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _changed(base: QuestConfig, changes: dict[str, Any]) -> QuestConfig:
    return QuestConfig.from_dict(asdict(base) | changes)


def _part(context: int, share: int) -> int:
    """That share of the context, in whole pages of any size."""
    return max(context // share // 64 * 64, 256)
