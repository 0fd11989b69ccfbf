"""Rows -> requests -> vLLM -> records, by Ray Data."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import ray
from ray.data import DataContext
from ray.data.checkpoint import CheckpointConfig
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from vllm_quest.batch.cluster import address_for_engines
from vllm_quest.batch.records import INFERENCE_ERROR, RecordSink, record
from vllm_quest.batch.rows import Request, RowError, parse_row, reason, sampling_params
from vllm_quest.batch.source import Chunk, RowSource
from vllm_quest.batch.summary import checkpoint_path

TASK_RETRIES = 5  # of rows whose engine died; without a limit one poisonous row would kill engines forever
START_SECONDS = 1800  # for the engines to be placed and to load the model


@dataclass(frozen=True)
class Batch:
    """What to run.

    Attributes:
        input: File or folder of rows; local, or a URI.
        output: Folder for the records; local, or a URI.
        model: Folder or name of the model.
        model_name: What rows call the model.
        replicas: Engines.
        tensor_parallel_size: Of each engine.
        pipeline_parallel_size: Of each engine.
        engine: Further arguments of vLLM's engine.
        sampling: Sampling parameters of rows that do not set them, as `rows.sampling_fields` returns them.
        chunk_rows: Rows that a worker takes at once, and of one output file.
        file_format: Of the output: ``jsonl`` or ``parquet``.
        cpus_per_worker: CPUs to reserve for one worker; without GPUs, its threads.
    """

    input: str
    output: str
    model: str
    model_name: str
    replicas: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    engine: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    chunk_rows: int = 32
    file_format: str = "jsonl"
    cpus_per_worker: int = 1

    @property
    def workers(self) -> int:
        """Workers of one engine."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def bundle(self, on_gpus: bool) -> dict[str, float]:
        """What Ray reserves for one worker."""
        bundle: dict[str, float] = {"CPU": self.cpus_per_worker}
        return bundle | {"GPU": 1} if on_gpus else bundle


def run(batch: Batch, chunks: list[Chunk], bundle: dict[str, float], tally: ray.actor.ActorHandle) -> None:
    """Answers all rows that have no record yet; returns when every record is written.

    Ray Data notes finished rows beside the output, and leaves them out when the same batch runs again; it
    restarts engines that die, and gives them their rows again.
    """
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.wait_for_min_actors_s = START_SECONDS
    context.checkpoint_config = CheckpointConfig(
        id_column="row", checkpoint_path=checkpoint_path(batch.output), delete_checkpoint_on_success=False
    )
    # One block per chunk: more blocks asked for than chunks would cut them up.
    rows = ray.data.read_datasource(RowSource(batch.input, chunks), override_num_blocks=len(chunks))
    records = _processor(batch, bundle)(rows).map(partial(record, model_name=batch.model_name))
    records.write_datasink(RecordSink(batch.output, batch.file_format, partial(_report, tally)))


def _report(tally: ray.actor.ActorHandle, *block: int) -> None:
    tally.add.remote(*block)


def _processor(batch: Batch, bundle: dict[str, float]) -> Any:
    parallel = {
        "tensor_parallel_size": batch.tensor_parallel_size,
        "pipeline_parallel_size": batch.pipeline_parallel_size,
    }
    config = vLLMEngineProcessorConfig(
        model_source=batch.model,
        engine_kwargs=batch.engine | parallel,
        runtime_env={"env_vars": {"RAY_ADDRESS": address_for_engines()}},
        concurrency=(batch.replicas, batch.replicas),
        batch_size=batch.chunk_rows,
        placement_group_config={"bundles": [bundle] * batch.workers},
        accelerator_type=None,
        should_continue_on_error=True,
        log_engine_metrics=False,  # needs ray[serve]
        # One bad row would fail its whole batch in these stages; `prepare` does their work row by row.
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )
    preprocess = partial(prepare, model=batch.model, model_name=batch.model_name, defaults=batch.sampling)
    processor = build_processor(config, preprocess=preprocess)
    processor.get_stage_by_name("vLLMEngineStage").map_batches_kwargs["max_task_retries"] = TASK_RETRIES
    return processor


def prepare(row: dict[str, Any], model: str, model_name: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """What the engine's stage needs of a row; a bad row says why in the column that makes it pass by.

    Args:
        row: ``place`` and ``line``, as `source` reads them.
        model: Folder or name of the model, for its tokenizer.
        model_name: What the row may call the model.
        defaults: Sampling parameters that the row need not set.
    """
    empty: dict[str, Any] = {
        "custom_id": None,
        "is_chat": False,
        "tokenized_prompt": [],
        "sampling_params": None,
        "max_tokens": 0,
    }
    tokenizer = _tokenizer(model)  # that it cannot be loaded is no row's fault
    custom_id = None
    try:
        request = parse_row(row["line"], model_name)
        custom_id = request.custom_id
        # A chat without max_tokens goes on until the context is full, as on vLLM's server.
        unlimited = {"max_tokens": None} if request.messages is not None else {}
        params = sampling_params(unlimited | defaults | request.sampling)
        tokens = _tokens(tokenizer, request)
    except Exception as error:  # whatever it is, it is one row's, and must not end the batch
        custom_id = getattr(error, "custom_id", None) or custom_id
        return empty | {"custom_id": custom_id, INFERENCE_ERROR: reason(error)}
    return {
        "custom_id": custom_id,
        "is_chat": request.messages is not None,
        "tokenized_prompt": tokens,
        # A dict would go through Arrow, where an integer becomes a float beside a row that has none.
        "sampling_params": UserDict(params),
        "max_tokens": params["max_tokens"] or 0,
        INFERENCE_ERROR: "",
    }


@cache
def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def _tokens(tokenizer: Any, request: Request) -> list[int]:
    """Token ids as vLLM's server would make them: a chat template brings its special tokens itself."""
    if isinstance(request.prompt, str):
        return tokenizer(request.prompt)["input_ids"]
    if request.prompt is not None:
        return request.prompt
    arguments = {"add_generation_prompt": True} | request.template
    kwargs = arguments.pop("chat_template_kwargs", {})
    try:
        text = tokenizer.apply_chat_template(request.messages, tokenize=False, **arguments, **kwargs)
    except Exception as error:  # a template is a program of the model's, and may raise anything
        raise RowError(f"messages: the chat template refuses them: {error}") from None
    return tokenizer(text, add_special_tokens=False)["input_ids"]
