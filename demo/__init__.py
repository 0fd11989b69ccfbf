"""The demo. It uses a local model only and sends no usage statistics, unless told to."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
