"""Executes what Triton compiles our kernels to, on a machine without a GPU.

`parse` reads PTX, `machine` runs one program of it on CPU memory, `arithmetic`, `transfers` and `warp` say
what the instructions do, and `launch` compiles what a launcher would launch and runs its whole grid.
`tests/kernels/test_ptx.py` compares the launches of `tests/tools/ptx_cases.py` with the reference.

All threads of a program take the same instruction at the same time, and programs run one after the other. So
a missing barrier does not show here, nor what ptxas makes of the PTX. Only what our cases need is there (no
`wgmma`, no tensor memory): an instruction that is not known is an error.
"""
