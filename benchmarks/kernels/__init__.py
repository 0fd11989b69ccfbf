"""One decode step of one layer: QUEST's kernels next to vLLM's, without an engine."""
