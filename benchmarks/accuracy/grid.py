"""Measures tasks under many configurations: one engine per layout of the cache, dense first.

Within an engine the configurations alternate at each context, or at as many as are measured at once, so its
prefill is paid once per engine.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.accuracy.configurations import Configurations, by_cache
from benchmarks.accuracy.engine import References, Rouge, measure
from benchmarks.accuracy.samples import DENSE, Header, Key, Results, Sample, batches
from benchmarks.common.machine import command, machine
from vllm_quest.config import QuestConfig
from vllm_quest.tune.instrument import TIMED_STEPS, Instrument

__all__ = ["DENSE", "Grid"]


@dataclass
class Grid:
    """One model and context length.

    Attributes:
        model: Folder or name, as vLLM takes it.
        context: Tokens that the samples were built for.
        samples: By task and index in it.
        configurations: By name; dense is measured as well.
        out: Folder of the results; what is there already is not measured again.
        rouge: ROUGE-L of a reference and a generated text.
        engine_args: More of vLLM's arguments.
        timed: Whether the time per token is measured, which needs a machine that is otherwise idle.
        contexts_at_once: Contexts whose samples are decoded in one batch; all must fit the prefix cache.
        versions: More of them, in addition to those of the machine.
    """

    model: str
    context: int
    samples: dict[Key, Sample]
    configurations: Configurations
    out: Path
    rouge: Rouge
    engine_args: dict[str, Any] = field(default_factory=dict)
    timed: bool = True
    contexts_at_once: int = 1
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = f"{Path(self.model).name}-{self.context}.jsonl"
        self.results = Results(self.out / name)
        self.references = References(self.out / "references" / name)

    def run(self) -> None:
        """Measures what is missing.

        Raises:
            ValueError: A configuration has the name of another one in the results: names leave out defaults,
                and those have changed since.
        """
        self._refuse_other_configurations()
        engines: list[dict[str, QuestConfig | None]] = [{DENSE: None}]
        engines += [dict(group) for group in by_cache(self.configurations)]
        missing = [{name: self._missing(name) for name in engine} for engine in engines]
        with tqdm(total=sum(len(keys) for group in missing for keys in group.values()), unit="score") as bar:
            for engine, keys in zip(engines, missing, strict=True):
                if any(keys.values()):
                    self._run_engine(
                        {name: config for name, config in engine.items() if keys[name]}, keys, bar
                    )

    def _refuse_other_configurations(self) -> None:
        for name, config in self.configurations.items():
            header = self.results.headers.get(name)
            if header is not None and header.quest != asdict(config):
                raise ValueError(
                    f"{self.results.path}: {name!r} was measured as {header.quest}, now it means "
                    f"{asdict(config)}; allowed: another --out, or entries that name every field"
                )

    def _missing(self, configuration: str) -> list[Key]:
        """Samples without a score; of dense also those whose reference is not there."""
        return [
            key
            for key in self.samples
            if not self.results.has(configuration, *key)
            or (configuration == DENSE and key not in self.references)
        ]

    def _run_engine(
        self, engine: dict[str, QuestConfig | None], missing: dict[str, list[Key]], bar: tqdm
    ) -> None:
        bar.set_description("start an engine")
        instrument = Instrument(
            next(iter(engine.values())),
            max_model_len=self._longest(),
            model=self.model,
            **self.engine_args,
        )
        try:
            for name, config in engine.items():
                bar.set_description(f"{name}: time a step" if self.timed else name)
                _configure(instrument, config)
                self.results.append(self._header(instrument, name, config))
            for keys in batches(self.samples, self.contexts_at_once):
                for name, config in engine.items():
                    wanted = {key: self.samples[key] for key in keys if key in missing[name]}
                    if not wanted:
                        continue
                    bar.set_description(name)
                    _configure(instrument, config)
                    for score in measure(instrument, name, wanted, self.references, self.rouge):
                        if not self.results.has(name, score.task, score.sample):
                            self.results.append(score)
                    bar.update(len(wanted))
        finally:
            instrument.close()

    def _longest(self) -> int:
        """Tokens of the longest request, the one that vLLM samples behind a prompt included."""
        longest = 0
        for sample in self.samples.values():
            asked = len(sample.context) + len(sample.question)
            answers = [sample.answer, *sample.distractors]
            longest = max(longest, asked + max(sample.generate, *map(len, answers)) + 1)
            longest = max(longest, len(sample.context) + TIMED_STEPS + 1)
        return longest

    def _header(self, instrument: Instrument, name: str, config: QuestConfig | None) -> Header:
        facts = machine()
        device = {key: facts.pop(key) for key in ("device", "cores")}
        context = next(iter(self.samples.values())).context
        return Header(
            configuration=name,
            quest=None if config is None else asdict(config),
            kv_bytes_per_token=instrument.kv_bytes_per_token,
            block_size=instrument.block_size,
            model=Path(self.model).name,
            context=self.context,
            seconds_per_token=instrument.seconds_per_token(context) if self.timed else None,
            versions=facts | self.versions,
            machine=device | {"load": f"{os.getloadavg()[0]:.1f}"},
            command=command()["command"],
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _configure(instrument: Instrument, config: QuestConfig | None) -> None:
    if config is not None:
        instrument.configure(config)
