"""The model of an SM's pipes reads machine code as cuobjdump prints it."""

from __future__ import annotations

import pipe_cycles

CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0 ;
        /*0020*/                   MUFU.EX2 R4, R5 ;
        /*0030*/              @!P0 FMNMX R4, R4, R5, !PT ;
        /*0038*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0040*/               @P1 BRA 0x10 ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR4].tnspB, R24, gsb0 ;
        /*0058*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/               @P0 BRA 0x0 ;
        /*0070*/               @P0 BRA 0x50 ;
                                                          /* 0x000fe20000000f00 */
"""


def code() -> list[pipe_cycles.Instruction]:
    return [i for line in CODE.splitlines() if (i := pipe_cycles.parse(line)) is not None]


def test_parses_predicates_and_operands() -> None:
    assert [i.opcode.split(".")[0] for i in code()] == [
        "MOV", "HGMMA", "MUFU", "FMNMX", "WARPGROUP", "BRA", "HGMMA", "WARPGROUP", "BRA", "BRA",
    ]  # fmt: skip
    assert "gsb0" in code()[1].operands


def test_the_hot_loop_computes_while_products_run() -> None:
    """Not one that waits for all of them, and the inner one of two."""
    loops = pipe_cycles.hot_loops(code())
    assert loops == [pipe_cycles.Cycles(instructions=5, tensor=64, mufu=8, alu=2)]
    assert pipe_cycles.hot_loops(code()[6:8]) == []


def test_consumers_of_two_kinds_have_a_loop_each() -> None:
    later = [i._replace(address=i.address + 0x100) for i in code()]
    later = [i._replace(operands=i.operands.replace("0x10 ", "0x110 ")) for i in later[:6]]
    assert len(pipe_cycles.hot_loops([*code(), *later])) == 2


OUT_OF_LINE = """
        /*0000*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0 ;
        /*0010*/               @P0 BRA 0x50 ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0030*/               @P1 BRA 0x0 ;
        /*0040*/                   EXIT ;
        /*0050*/                   MUFU.EX2 R4, R5 ;
        /*0060*/                   BRA 0x20 ;
"""


def test_what_stands_behind_a_loop_and_goes_back_into_it_is_part_of_it() -> None:
    parsed = [i for line in OUT_OF_LINE.splitlines() if (i := pipe_cycles.parse(line)) is not None]
    assert pipe_cycles.natural_loops(parsed) == [frozenset({0, 1, 2, 3, 5, 6})]
    assert [loop.mufu for loop in pipe_cycles.hot_loops(parsed)] == [8]


LOOP = """
        /*0000*/                   HMMA.16816.F32 R24, R8, R4, R24 ;
        /*0010*/               @P0 BRA 0x60 ;
        /*0020*/                   LDG.E.128 R4, [R2] ;
        /*0030*/                   STS.128 [R2], R4 ;
        /*0040*/                   BRA 0x90 ;
        /*0050*/                   NOP ;
        /*0060*/                   LDG.E.U16 R4, [R2] ;
        /*0070*/                   LDG.E.U16 R5, [R2+0x2] ;
        /*0080*/               @P1 BRA 0x60 ;
        /*0090*/               @P2 BRA 0xc0 ;
        /*00a0*/                   FSETP.GT P3, R4, R5, PT ;
        /*00b0*/                   FFMA R4, R5, R6, R7 ;
        /*00c0*/                   LDSM.16.M88.4 R8, [R3] ;
        /*00d0*/                   MUFU.EX2 R4, R5 ;
        /*00e0*/                   HMMA.16816.F32 R24, R8, R4, R24 ;
        /*00f0*/               @P4 BRA 0x0 ;
        /*0100*/                   EXIT ;
"""


def test_the_hot_path_keeps_to_what_has_to_be_done() -> None:
    """Past masks and copies of single elements, and not past those of 16 bytes."""
    loop = [i for line in LOOP.splitlines() if (i := pipe_cycles.parse(line)) is not None]
    path = pipe_cycles.hot_path(loop)
    assert path is not None
    passed = [0x0, 0x10, 0x20, 0x30, 0x40, 0x90, 0xC0, 0xD0, 0xE0, 0xF0]
    assert [i.address for i in path] == passed
    cycles = pipe_cycles.path_cycles(path, pipe_cycles.RATES["sm_80"])
    assert cycles.pipes == {
        "issue": 10, "tensor": 16, "mufu": 8, "alu": 0, "fp32": 0, "shared": 3 * 16,
    }  # fmt: skip
    assert cycles.bound == ("shared", 48)
    assert cycles[6:] == (2, 0, 1, 0)
    assert pipe_cycles.hot_path(loop[1:3]) is None


def test_turing_takes_twice_as_long() -> None:
    (product,) = [pipe_cycles.Instruction(0, "HMMA.1688.F32", "")]
    for arch, tensor in (("sm_75", 8), ("sm_80", 4)):
        assert pipe_cycles.path_cycles([product], pipe_cycles.RATES[arch]).tensor == tensor


def test_code_that_nothing_leads_to_hides_no_loop() -> None:
    """Such as what stands behind a branch back, where only a call goes to."""
    lines = [line for line in LOOP.splitlines() if "/*00e0*/" in line or "/*0100*/" in line]
    back = "        /*00f0*/                   BRA 0xe0 ;"
    code = [i for line in (lines[0], back, lines[1]) if (i := pipe_cycles.parse(line)) is not None]
    assert [len(loop) for loop in pipe_cycles.loops(code)] == [2]
