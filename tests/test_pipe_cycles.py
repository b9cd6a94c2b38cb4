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
    loop = pipe_cycles.hot_loop(code())
    assert loop == pipe_cycles.Cycles(instructions=5, tensor=64, mufu=8, alu=2)
    assert pipe_cycles.hot_loop(code()[6:8]) is None
