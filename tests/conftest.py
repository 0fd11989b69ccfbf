"""Settings that must be there before torch and vLLM are imported."""

import os

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Spinning OpenMP threads make a busy two-core machine twenty times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Tests read vLLM's log; commands that quiet it are imported by tests too.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
