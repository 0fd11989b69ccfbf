"""Every instruction that is known, by its name."""

from __future__ import annotations

from tools.ptx.arithmetic import ARITHMETIC
from tools.ptx.transfers import TRANSFERS
from tools.ptx.warp import WARPS

__all__ = ["SEMANTICS"]

SEMANTICS = {**ARITHMETIC, **TRANSFERS, **WARPS}
