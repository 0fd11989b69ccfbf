"""Every instruction that is known, by its name."""

from __future__ import annotations

from tests.ptx.arithmetic import ARITHMETIC
from tests.ptx.transfers import TRANSFERS
from tests.ptx.warp import WARPS

__all__ = ["SEMANTICS"]

SEMANTICS = {**ARITHMETIC, **TRANSFERS, **WARPS}
