"""Measurements; see README.md. They use local models only and send no usage statistics, unless told to."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
