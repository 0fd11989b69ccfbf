"""What is in a compiled kernel: registers, spills, loads, and what some Triton is known to get wrong."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

import triton

from tools.compile_check.control_flow import in_loops

__all__ = ["Figures", "figures", "fills_wrongly", "unaligned_pointers"]


@dataclass(frozen=True)
class Figures:
    registers: int  # per thread
    register_limit: int  # that many the compiler could have given it
    spilled: int  # bytes per thread
    loop_spills: int | None  # instructions in loops that store or load what is spilled; None: not looked for
    wide_loads: int  # from device memory, 16 bytes per thread
    loads: int  # all of them

    @property
    def spills(self) -> bool:
        """Whether registers run out, in a loop where that is known: elsewhere it may pay for more programs.

        Below the limit ptxas puts loop invariants on the stack, too, to have more programs at once; that is
        its choice.
        """
        if self.loop_spills is None:
            return self.spilled > 0
        return self.loop_spills > 0 and self.registers > self.register_limit - 8


def figures(compiled) -> Figures:
    """Of a kernel that Triton compiled.

    Raises:
        RuntimeError: A compiler's output that is not as expected.
    """
    return _nvidia_figures(compiled) if "cubin" in compiled.asm else _amd_figures(compiled)


def fills_wrongly(ttgir: str) -> bool:
    """Whether a masked load puts negative bytes or halves in: Triton 3.6 extends their sign over a word."""
    negative = set(re.findall(r"(%\w+) = arith\.constant dense<-\d+> : tensor<[^>]*xi(?:8|16)\b", ttgir))
    loads = re.findall(r"tt\.load %[^,\n]+, %[^,\n]+, (%\w+)|mask %\S+ other (%\w+)", ttgir)
    return any(negative & set(found) for found in loads)


def unaligned_pointers(ttgir: str) -> list[str]:
    """Pointer arguments that the compiler does not know to be multiples of 16 bytes; also those in tuples."""
    signature = re.search(r"tt\.func public @\w+\((.*)\) attributes", ttgir)
    if signature is None:
        raise RuntimeError("the compiler's output has no kernel")
    pointers = re.findall(r"%([\w.]+): !tt\.ptr<[^>]*>( {[^}]*})?", signature.group(1))
    return [name for name, attributes in pointers if "tt.divisibility = 16" not in attributes]


def _nvidia_figures(compiled) -> Figures:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run_tool("cuobjdump", "-res-usage", cubin.name)
        sass = _run_tool("nvdisasm", "-c", cubin.name)
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.E\S*", sass)
    return Figures(
        _number("REG", usage),
        compiled.metadata.maxnreg or min(255, 65536 // (32 * compiled.metadata.num_warps)),
        # What is spilled lies on the stack, and our kernels put nothing else there.
        _number("STACK", usage),
        sum(re.search(r"\b(?:LDL|STL)\b", instruction) is not None for instruction in in_loops(sass)),
        sum(".128" in load for load in loads),
        len(loads),
    )


def _amd_figures(compiled) -> Figures:
    text = compiled.asm["amdgcn"]
    # Scalar registers spill into vector registers; where those run out, ScratchSize says so.
    spilled = sum(_number(name, text) for name in (r"\.vgpr_spill_count", "ScratchSize"))
    loads = re.findall(r"\b(?:global|buffer)_load_\w+", text)
    wide = sum("dwordx4" in load for load in loads)
    # The limit is that of a wave alone on its SIMD unit.
    return Figures(_number(r"\.vgpr_count", text), 512, spilled, None, wide, len(loads))


def _run_tool(name: str, *arguments: str) -> str:
    tool = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _number(name: str, text: str) -> int:
    """The number behind `name`, as the compilers print it."""
    found = re.search(rf"{name}:?\s*(\d+)", text)
    if found is None:
        raise RuntimeError(f"the compiler's output has no {name}")
    return int(found.group(1))
