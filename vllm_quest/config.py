"""The one configuration object: ``additional_config={"quest": {...}}``, validated once, then frozen."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vllm_quest.errors import QuestConfigError
from vllm_quest.formats import FORMATS, KVFormat
from vllm_quest.registration import INT4_CACHE_DTYPE
from vllm_quest.scorers import SCORERS, PageScorer

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = [
    "BOUNDS_DTYPES",
    "GROUP_REDUCES",
    "NO_CONTEXT",
    "PAGE_SIZES",
    "SELECTION_FIELDS",
    "QuestConfig",
    "QuestConfigError",
    "current_config",
]

PAGE_SIZES = (8, 16, 32, 64)
GROUP_REDUCES = ("max", "mean", "softmax_mean")
BOUNDS_DTYPES = ("auto", "int8", "bfloat16")
RENAMED = {"metadata_dtype": "bounds_dtype"}  # fields by their names before 0.2
NO_CONTEXT = 2**31 - 1  # tokens; a context that is never reached
# What may change while a cache is in use; every other field says how the cache lies.
SELECTION_FIELDS = (
    "token_budget",
    "dense_layers",
    "sink_pages",
    "recent_pages",
    "group_reduce",
    "min_context",
    "value_threshold",
    "decode_tail",
)


@dataclass(frozen=True)
class QuestConfig:
    """How decode selects pages.

    Attributes:
        token_budget: Tokens that one decode step reads per KV head and layer. A multiple of `page_size`, and
            at least the pages that are always kept. None: all of them, that is dense attention.
        page_size: Tokens per page, the unit that is scored and selected. 8, 16, 32 or 64; divides vLLM's
            ``block_size`` (what vLLM allocates). None: the format's, 8 or with ``int4`` 16.
        dense_layers: The first N layers of the model read everything (QUEST section 4.1 uses 2; why 0 is the
            default: docs/design.md).
        sink_pages: First pages of a context that every step reads.
        recent_pages: Last pages of a context that every step reads, the one being filled included.
        group_reduce: How the scores of the query heads that share a KV head become one: ``max``, ``mean``, or
            ``softmax_mean`` (mean over the heads of each head's softmax over its pages).
        scorer: How a page is scored, a key of `SCORERS`. ``minmax`` is the upper bound of QUEST, equation 2.
        min_context: Contexts shorter than this many tokens are decoded densely.
        kv_dtype: How K and V are stored, a key of `FORMATS`: ``auto`` (the model's dtype) or ``int4``
            (docs/int4.md).
        bounds_dtype: How page bounds are stored: ``int8``, ``auto`` (the model's dtype; ``int8`` where
            `kv_dtype` is ``int4``), or, with ``int4`` only, ``bfloat16``; rounded outward.
        value_group_size: Channels of V that share a zero point and a scale, with ``int4``: 32, 64 or 128;
            None for one group per head.
        value_threshold: t: V rows are not read where no query head of the group has e^-t of its largest
            probability. A positive number; None reads every V row of the selected pages. The
            counters count them as read.
        decode_tail: The last N tokens of a prompt select pages as if they had been decoded one by one; for
            measuring. Needs whole prompts, ``enable_chunked_prefill=False``, and neither ``softmax_mean`` nor
            ``int4`` (docs/design.md).
    """

    token_budget: int | None = 2048
    page_size: int = None  # type: ignore[assignment]  # an int from `__post_init__` on
    dense_layers: int = 0
    sink_pages: int = 1
    recent_pages: int = 2
    group_reduce: str = "max"
    scorer: str = "minmax"
    min_context: int = 0
    kv_dtype: str = "auto"
    bounds_dtype: str = "int8"
    value_group_size: int | None = None
    value_threshold: float | None = None
    decode_tail: int = 0

    def __post_init__(self) -> None:
        self._check_choice("kv_dtype", FORMATS)
        self._check_choice("scorer", SCORERS)
        self._check_choice("bounds_dtype", BOUNDS_DTYPES)
        self._check_choice("group_reduce", GROUP_REDUCES)
        self._check_choice("value_group_size", (None, 32, 64, 128))
        self._check_count("dense_layers", 0)
        self._check_count("sink_pages", 0)
        self._check_count("recent_pages", 1)
        self._check_count("min_context", 0)
        self._check_count("decode_tail", 0)
        if self.page_size is None:
            object.__setattr__(self, "page_size", self.format.page_size)
        self._check_choice("page_size", PAGE_SIZES)
        _ = self.format, self.page_scorer  # which refuse what does not go with them
        if self.token_budget is not None:
            self._check_budget()
        if self.value_threshold is not None:
            self._check_positive("value_threshold")
        if self.decode_tail and not self.steps_alike:
            raise QuestConfigError(
                "decode_tail",
                f"{self.decode_tail} tokens at once would not give what single steps do with "
                f"group_reduce={self.group_reduce}, kv_dtype={self.kv_dtype}",
                "0, or group_reduce max or mean and kv_dtype auto",
            )

    @cached_property
    def format(self) -> KVFormat:
        """How K and V are stored."""
        return FORMATS[self.kv_dtype](self)

    @cached_property
    def page_scorer(self) -> PageScorer:
        """How pages are scored."""
        return SCORERS[self.scorer](self)

    @property
    def budget_pages(self) -> int:
        """Most pages read per (row, KV head), those always kept included."""
        return (self.token_budget or NO_CONTEXT) // self.page_size

    @property
    def sparse_context(self) -> int:
        """Tokens of the shortest context that selects pages: `min_context`, and more than the budget."""
        return max(self.min_context, self.token_budget + 1) if self.token_budget else NO_CONTEXT

    @property
    def steps_alike(self) -> bool:
        """Whether tokens that come together, as in `decode_tail`, select what they would one by one."""
        return self.group_reduce != "softmax_mean" and self.format.steps_alike

    @property
    def cache_fields(self) -> dict[str, Any]:
        """The fields that say how the cache lies: engines that agree in them can read each other's pages."""
        return {name: value for name, value in asdict(self).items() if name not in SELECTION_FIELDS}

    @classmethod
    def from_dict(cls, entries: Any) -> QuestConfig:
        """Builds the configuration from a user's mapping.

        Raises:
            QuestConfigError: Not a mapping, an unknown key, or a value that is not allowed.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(entries, dict):
            raise QuestConfigError("", f"{entries!r} is not a mapping", f"a mapping with {', '.join(names)}")
        for key in entries:
            if key not in names:
                guess = RENAMED.get(key) or next(iter(difflib.get_close_matches(str(key), names, n=1)), None)
                hint = f" (did you mean {guess!r}?)" if guess else ""
                raise QuestConfigError("", f"unknown key {key!r}{hint}", ", ".join(names))
        return cls(**entries)

    @classmethod
    def from_vllm_config(cls, vllm_config: VllmConfig) -> QuestConfig:
        """The configuration that this engine was started with; defaults where the user gave none.

        Raises:
            QuestConfigError: As `from_dict`.
            ValueError: QUEST cannot run this engine; names the flag or the property of the model.
        """
        additional = vllm_config.additional_config
        entries = additional.get("quest", {}) if isinstance(additional, dict) else {}
        if vllm_config.cache_config.cache_dtype == INT4_CACHE_DTYPE and isinstance(entries, dict):
            entries = entries | {"kv_dtype": "int4"}
        config = cls.from_dict(entries)
        config.check_engine(vllm_config)
        return config

    def check_engine(self, vllm_config: VllmConfig) -> None:
        """Refuses an engine that QUEST cannot run with this configuration.

        Raises:
            ValueError: Names each flag or property of the model that is in the way.
        """
        model, cache = vllm_config.model_config, vllm_config.cache_config
        refused = []
        if model is not None and model.use_mla:
            refused.append("the model uses MLA, which keeps no K per head for page bounds")
        if model is not None and model.is_encoder_decoder:
            refused.append("the model has cross-attention; only decoder self-attention is supported")
        if cache.cache_dtype not in ("auto", INT4_CACHE_DTYPE):
            refused.append(f"--kv-cache-dtype is {cache.cache_dtype}; allowed: auto, {INT4_CACHE_DTYPE}")
        if vllm_config.parallel_config.decode_context_parallel_size > 1:
            refused.append("--decode-context-parallel-size splits a context over ranks; allowed: 1")
        if cache.user_specified_block_size and cache.block_size % self.page_size:
            refused.append(
                f"--block-size {cache.block_size} is not a multiple of additional_config['quest'].page_size "
                f"{self.page_size}"
            )
        scheduler = vllm_config.scheduler_config
        if self.decode_tail and (scheduler.enable_chunked_prefill or scheduler.long_prefill_token_threshold):
            refused.append(
                f"additional_config['quest'].decode_tail is {self.decode_tail}, and vLLM does not tell where "
                "a prompt ends; allowed: 0, or --no-enable-chunked-prefill, so that each comes in one step"
            )
        if refused:
            raise ValueError(f"--attention-backend QUEST cannot run this engine: {'; '.join(refused)}")

    def _check_budget(self) -> None:
        self._check_count("token_budget", 1)
        assert self.token_budget is not None
        always = self.sink_pages + self.recent_pages
        if self.token_budget % self.page_size or self.budget_pages < always:
            raise QuestConfigError(
                "token_budget",
                f"{self.token_budget} does not fit page_size={self.page_size}, sink_pages={self.sink_pages} "
                f"and recent_pages={self.recent_pages}",
                f"null, or a multiple of {self.page_size}, at least {always * self.page_size}",
            )

    def _check_choice(self, name: str, allowed: Collection) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or value not in tuple(allowed):
            raise QuestConfigError(name, f"{value!r}", ", ".join(map(str, allowed)))

    def _check_count(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise QuestConfigError(name, f"{value!r}", f"an integer, at least {least}")

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise QuestConfigError(name, f"{value!r}", "a positive number, or null")


_current: QuestConfig | None = None


def current_config() -> QuestConfig:
    """The configuration of the engine that this process is building.

    vLLM builds a model inside its configuration context and asks the backend for the KV cache spec right
    afterwards, in the same process but outside that context (0.32, 0.33). So the last one holds.

    Raises:
        RuntimeError: No engine was built in this process yet.
    """
    from vllm.config import get_current_vllm_config_or_none

    global _current
    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is not None:
        _current = QuestConfig.from_vllm_config(vllm_config)
    if _current is None:
        raise RuntimeError("QUEST has no configuration yet: no vLLM engine was configured in this process")
    return _current
