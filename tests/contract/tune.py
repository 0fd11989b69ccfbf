"""Measuring quality: the engine as a user starts it, and a logits processor."""

from __future__ import annotations

from tests.contract.reliance import Contract, On

_PROCESSOR = "vllm.v1.sample.logits_processor.AdapterLogitsProcessor"

TUNE: Contract = {
    "vllm_quest/tune/forcing.py": (
        On("vllm.SamplingParams", "names the tokens to force", attributes=("extra_args",)),
        On(
            _PROCESSOR,
            "our base class",
            bases=("LogitsProcessor",),
            declared=("is_argmax_invariant(self)", "new_req_logits_processor(self, params)"),
        ),
        On(f"{_PROCESSOR}._new_state", "the tokens so far come first", code=("args = [output_ids]",)),
    ),
    "vllm_quest/tune/instrument.py": (
        On("vllm.LLM", "the engine", called=("generate(prompts, sampling_params, use_tqdm=...)",)),
        On("vllm.platforms.current_platform", "whether this is a CPU"),
        On("vllm.platforms.Platform", "what current_platform is", called=("is_cpu()",)),
        On(
            "vllm.SamplingParams",
            "what is asked of a request",
            attributes=(
                "temperature",
                "max_tokens",
                "ignore_eos",
                "detokenize",
                "flat_logprobs",
                "logprobs",
                "prompt_logprobs",
                "skip_reading_prefix_cache",
                "extra_args",
            ),
        ),
    ),
    "vllm_quest/tune/worker.py": (
        On(
            "vllm.v1.worker.gpu_model_runner.GPUModelRunner",
            "where the builders are",
            attributes=("attn_groups",),
        ),
        On("vllm.v1.worker.utils.AttentionGroup", "a group's builders", attributes=("metadata_builders",)),
    ),
}
