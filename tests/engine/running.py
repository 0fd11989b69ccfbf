"""Running prompts, as every engine test does."""

from __future__ import annotations

from vllm import SamplingParams

LAYERS, KV_HEADS = 30, 3
DEFAULTS = {"token_budget": 512}  # pages of 8, 8-bit bounds, every layer sparse
QUARTER = {"token_budget": 512, "page_size": 16, "bounds_dtype": "auto", "dense_layers": 2}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def generate(llm, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[tuple[int, ...]]:
    """Token ids of the first sample of every prompt."""
    return [samples[0] for samples in generate_all(llm, prompts, params)]


def generate_all(llm, prompts: list[list[int]], params: SamplingParams) -> list[list[tuple[int, ...]]]:
    """Token ids of every sample of every prompt."""
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return [[tuple(sample.token_ids) for sample in output.outputs] for output in outputs]


def metric(llm, name: str) -> float:
    """One of vLLM's own counters."""
    return sum(m.value for m in llm.get_metrics() if m.name == name)
