"""What the compile check reads from compiled kernels."""

from __future__ import annotations

import re

import pytest

from tests.tools.spilling import compiled_figures
from tests.tools.struct_kernel import SIZE, compiled_struct
from tools.compile_check.compiled import Figures, unaligned_pointers
from tools.compile_check.control_flow import in_loops


def test_spills_in_a_loop_are_found(compiling) -> None:
    figures = compiling.submit(compiled_figures, "everywhere", 32).result()
    assert figures.loop_spills > 0
    assert figures.register_limit == 32
    assert figures.spills


def test_spills_around_a_loop_are_none_in_it(compiling) -> None:
    figures = compiling.submit(compiled_figures, "around_the_loop", 32).result()
    assert figures.spilled > 0
    assert figures.loop_spills == 0
    assert not figures.spills


def test_where_loops_are_not_looked_for_every_spill_counts() -> None:
    assert Figures(128, 512, spilled=4, loop_spills=None, wide_loads=1, loads=1).spills


@pytest.mark.parametrize(("limit", "spills"), [(255, False), (168, True)])
def test_registers_have_run_out_near_the_limit_only(limit, spills) -> None:
    assert Figures(168, limit, spilled=8, loop_spills=2, wide_loads=1, loads=1).spills is spills


def test_pointers_in_structs_keep_their_alignment(compiling) -> None:
    unaligned, figures, parameters = compiling.submit(compiled_struct, 0).result()
    assert unaligned == []
    assert figures.loads == figures.wide_loads == SIZE // (4 * 32)
    assert parameters == [2, SIZE, 1, SIZE]  # neither None nor 1: they are compiled in


def test_a_pointer_of_unknown_alignment_in_a_struct_is_found(compiling) -> None:
    unaligned, _, _ = compiling.submit(compiled_struct, 1).result()
    assert len(unaligned) == 1


def test_unaligned_pointers_are_named() -> None:
    arguments = "%a.b: !tt.ptr<f32> {tt.divisibility = 16 : i32}, %c: !tt.ptr<bf16, 1>, %d: i32"
    assert unaligned_pointers(f"tt.func public @_kernel({arguments}) attributes {{}}") == ["c"]
    with pytest.raises(RuntimeError, match="no kernel"):
        unaligned_pointers("")


def sass(text: str) -> str:
    """As nvdisasm prints it; loads and stores of the stack tell the places apart."""
    lines = [".text._kernel:"]
    for number, line in enumerate(filter(None, map(str.strip, text.splitlines()))):
        lines.append(line if line.endswith(":") else f"        /*{16 * number:04x}*/    {line} ;")
    return "\n".join(lines)


def stack_offsets(text: str) -> list[str]:
    return re.findall(r"R1\+(\w+)", " ".join(in_loops(sass(text))))


def test_nested_loops_and_what_lies_around_them() -> None:
    assert stack_offsets(
        """
        STL [R1+0x0], R0
        .L_x_0:
        STL [R1+0x4], R0
        .L_x_1:
        LDL R0, [R1+0x8]
        @P0 BRA `(.L_x_1)
        @P1 BRA `(.L_x_2)
        LDL R0, [R1+0xc]
        @!P2 BRA P3, `(.L_x_0)
        .L_x_2:
        LDL R0, [R1+0x10]
        EXIT
        """
    ) == ["0x4", "0x8", "0xc"]


def test_a_seldom_part_of_a_loop_behind_the_end() -> None:
    """In the loop is what is behind the end, not what the branch back from there spans."""
    assert stack_offsets(
        """
        .L_x_0:
        BRA.DIV UR4, `(.L_x_2)
        .L_x_1:
        @P0 BRA `(.L_x_0)
        LDL R0, [R1+0x0]
        @P1 BRA `(.L_x_3)
        EXIT
        .L_x_2:
        LDL R0, [R1+0x4]
        BRA `(.L_x_1)
        .L_x_3:
        LDL R0, [R1+0x8]
        EXIT
        """
    ) == ["0x4"]


def test_a_predicated_exit_ends_no_loop() -> None:
    assert stack_offsets(
        """
        .L_x_0:
        @P0 EXIT
        LDL R0, [R1+0x0]
        BRA `(.L_x_0)
        """
    ) == ["0x0"]


def test_a_routine_that_a_loop_calls() -> None:
    assert stack_offsets(
        """
        CALL.REL.NOINC `($once)
        .L_x_0:
        CALL.REL.NOINC `($often)
        @P0 BRA `(.L_x_0)
        EXIT
        $once:
        STL [R1+0x0], R0
        RET.REL.NODEC R2 `(_kernel)
        $often:
        @P0 BRA `(.L_x_1)
        STL [R1+0x4], R0
        .L_x_1:
        LDL R0, [R1+0x8]
        RET.REL.NODEC R2 `(_kernel)
        """
    ) == ["0x4", "0x8"]


def test_a_jump_to_a_register_is_refused() -> None:
    with pytest.raises(RuntimeError, match="BRX"):
        in_loops(sass("BRX R4 -0x40"))
