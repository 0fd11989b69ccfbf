"""Everything of vLLM that vllm_quest relies on, by our file, in the order of the data flow.

A new import, override or attribute read in vllm_quest without an entry fails `test_ours.py`. What a version
of vLLM does not keep fails `test_vllm.py` with the entry, what is there instead, and our file; what then
differs between supported versions belongs into ``vllm_quest/compat.py``.
"""

from __future__ import annotations

from tests.contract.backend import BACKEND
from tests.contract.batch import BATCH
from tests.contract.cpu import CPU
from tests.contract.gpu import GPU
from tests.contract.planned import PLANNED
from tests.contract.reliance import Contract
from tests.contract.startup import STARTUP
from tests.contract.tune import TUNE

CONTRACT: Contract = {**STARTUP, **BACKEND, **CPU, **GPU, **TUNE, **BATCH, **PLANNED}
