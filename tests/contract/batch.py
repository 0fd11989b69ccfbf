"""Offline batches, and vLLM's Ray executor."""

from __future__ import annotations

from tests.contract.reliance import Contract, On

_EXECUTOR = "vllm.v1.executor.ray_executor_v2"

BATCH: Contract = {
    "vllm_quest/batch/rows.py": (
        On("vllm.exceptions.VLLMError", "what SamplingParams raises", bases=("Exception",)),
        On(
            "vllm.SamplingParams",
            "what a row may set; pydantic checks the types",
            bases=("PydanticMsgspecMixin",),
            attributes=(
                *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop"),
                *("stop_token_ids", "ignore_eos", "presence_penalty", "frequency_penalty"),
                *("repetition_penalty", "logprobs", "bad_words", "allowed_token_ids", "structured_outputs"),
                *("skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"),
            ),
        ),
        On(
            "vllm.entrypoints.launchers.run_batch.BatchRequestInput",
            "our rows are those of run-batch",
            attributes=("custom_id", "method", "url", "body"),
        ),
    ),
    "vllm_quest/batch/pipeline.py": (
        On(
            "vllm.engine.arg_utils.AsyncEngineArgs",
            "what ray.data.llm starts engines with",
            attributes=(
                *("attention_backend", "additional_config", "kv_cache_dtype", "disable_log_stats"),
                *("tensor_parallel_size", "pipeline_parallel_size", "distributed_executor_backend"),
            ),
        ),
        On(
            f"{_EXECUTOR}.RayWorkerProc.initialize_worker",
            "workers of the Ray executor get the environment of their engine, our counters' folder with it",
            code=("os.environ.setdefault(key, value)",),
        ),
    ),
}
