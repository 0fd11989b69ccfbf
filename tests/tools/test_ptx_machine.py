"""That the machine computes as PTX says, and stops where a GPU would go wrong."""

from __future__ import annotations

import numpy as np
import pytest

from tools.ptx.machine import Machine, PtxError
from tools.ptx.memory import Memory
from tools.ptx.parse import parse
from tools.ptx.semantics import SEMANTICS

START = 4096  # of 64 words of device memory
KERNEL = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid 32
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd1, [kernel_param_0];
	mov.u32 	%r1, %tid.x;
	mad.wide.u32 	%rd2, %r1, 4, %rd1;
	shl.b32 	%r2, %r1, 4;
{body}
	st.global.b32 	[%rd2], %r3;
	ret;
}}
"""


def run(body: str) -> np.ndarray:
    """``[32]`` what the threads left in %r3; 64 words of memory hold their own index before."""
    words = np.arange(64, dtype=np.uint32)
    device = Memory([(START, words.view(np.uint8))])
    kernel = parse(KERNEL.format(body=body))
    Machine(kernel, SEMANTICS, device, {"kernel_param_0": START}, threads=32, shared_size=512).run()
    return words[:32]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("sub.s32 %r3, 3, %r1; shr.s32 %r3, %r3, 1;", lambda t: (3 - t) >> 1),
        ("sub.s32 %r3, 3, %r1; div.s32 %r3, %r3, 2;", lambda t: np.trunc((3 - t) / 2)),
        ("shl.b32 %r3, 1, %r1; bfe.s32 %r3, %r3, 4, 4;", lambda t: ((1 << t >> 4 & 15) ^ 8) - 8),
        ("prmt.b32 %r3, %r1, 0x8000, 0x7D50U;", lambda t: t + (0x80 << 8) + (0xFF << 16)),
        ("cvt.u16.u32 %rs1, %r1; not.b16 %rs1, %rs1; cvt.s32.s16 %r3, %rs1;", lambda t: -t - 1),
        (
            "cvt.rn.f32.u32 %r3, %r1; cvt.rn.bf16x2.f32 %r3, %r3, 0f3F800000;",
            lambda t: t.astype(np.float32).view(np.uint32) & 0xFFFF0000 | 0x3F80,
        ),
        (
            "setp.lt.u32 %p1, %r1, 9; mov.b32 %r3, 5; @%p1 ld.global.b32 %r3, [%rd2+128];",
            lambda t: np.where(t < 9, t + 32, 5),
        ),
        ("shfl.sync.bfly.b32 %r3, %r1, 3, 31, -1;", lambda t: t ^ 3),
    ],
)
def test_results(body, expected) -> None:
    bits = expected(np.arange(32)).astype(np.int64).astype(np.uint32)
    np.testing.assert_array_equal(run(body), bits)


def test_a_copy_is_seen_when_it_is_waited_for() -> None:
    copy = """cp.async.ca.shared.global [ %r2 + 0 ], [ %rd2 + 0 ], 0x4, %r4; cp.async.commit_group;"""
    body = f"mov.b32 %r4, 4; {copy} cp.async.wait_group {{}}; ld.shared.b32 %r3, [%r2];"
    np.testing.assert_array_equal(run(body.format(0)), np.arange(32))
    assert (run(body.format(1)) == 2**32 - 1).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("wgmma.fence.sync.aligned; mov.b32 %r3, 0;", "unknown instructions: wgmma.fence.sync.aligned"),
        ("add.sat.s32 %r3, %r1, 1;", "unknown instructions: add.sat.s32"),
        ("ld.global.b32 %r3, [%rd2+136];", r"ld.global.b32 .*: thread 30: address 0x1100 is outside"),
        ("ld.global.b32 %r3, [%rd2+2];", "thread 0: address 0x1002 is misaligned"),
        ("ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%r2+16];", "thread 31: address 0x200 is outside"),
        ("setp.lt.u32 %p1, %r1, 9; @%p1 bra $L__BB0_1; $L__BB0_1: mov.b32 %r3, 0;", "threads part ways"),
        ("add.s32 %r3, %r4, 1;", "%r4"),
    ],
)
def test_errors(body, message) -> None:
    with pytest.raises(PtxError, match=message):
        run(body)
