"""``vllm-quest batch``: offline batches on Ray.

The data flow: `source` (input files -> rows) -> `rows` (one row -> request) -> vLLM, by ``ray.data.llm`` ->
`records` (answers -> output files). `pipeline` connects them, `cluster` knows the machines, `summary` says
what came out, `job` is one run of it all.
"""
