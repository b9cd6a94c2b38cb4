"""How long a loop of machine code keeps each pipe of an SM of Hopper busy: a model, by the rates
NVIDIA states for an SM's quarter. It ranks variants and shows what grows; it predicts no time.

An iteration of a consumer warpgroup is one warp a quarter. What its other pipes need has to fit
beside the tensor cores' cycles of all consumers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Instruction(NamedTuple):
    address: int
    opcode: str  # such as HGMMA.64x128x16.F32.BF16
    operands: str


class Cycles(NamedTuple):
    """Of one iteration."""

    instructions: int  # the quarter issues one a cycle
    tensor: float
    mufu: float
    alu: float

    def __str__(self) -> str:
        return (
            f"{self.instructions} instructions, cycles: tensor {self.tensor:.0f},"
            f" mufu {self.mufu:.0f}, alu {self.alu:.0f}"
        )


# such as "        /*0a30*/              @!P0 LDGSTS.E.BYPASS.128 [R9], [R4.64] ;"
LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9][\w.]*)(.*);")
HGMMA = re.compile(r"HGMMA\.64x(\d+)x16")
MACS = 2048  # dense multiply-adds of 16-bit elements a cycle, in the whole SM
# Cycles a warp's instruction takes: 4 lanes at a time, or 16.
MUFU, ALU = 8, 2
ALU_OPCODES = re.compile(
    r"(FMNMX|FSETP|ISETP|LOP3|SEL|FSEL|IMNMX|VIMNMX|PRMT|SHF|IADD3|LEA|PLOP3|VIADD|F2FP)\b"
)


def parse(line: str) -> Instruction | None:
    found = LINE.match(line)
    return Instruction(int(found[1], 16), found[2], found[3]) if found else None


def cycles(instructions: Iterable[Instruction]) -> Cycles:
    count, tensor, mufu, alu = 0, 0.0, 0.0, 0.0
    for _, opcode, _ in instructions:
        count += 1
        if (product := HGMMA.match(opcode)) is not None:
            tensor += 64 * int(product[1]) * 16 / MACS
        mufu += MUFU * opcode.startswith("MUFU")
        alu += ALU * (ALU_OPCODES.match(opcode) is not None)
    return Cycles(count, tensor, mufu, alu)


def overlaps(instruction: Instruction) -> bool:
    """A wait that lets later products run on."""
    opcode, operands = instruction.opcode, instruction.operands.strip()
    return opcode.startswith("WARPGROUP.DEPBAR") and not operands.endswith(" 0x0")


def loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """From where a branch leads back to, to the branch."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    for end, (address, opcode, operands) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", operands)
        if opcode.startswith("BRA") and target is not None and int(target[1], 16) <= address:
            yield code[index[int(target[1], 16)] : end + 1]


def hot_loop(code: list[Instruction]) -> Cycles | None:
    """The smallest loop that computes while products run. Code that a branch mostly passes over, as
    that of masks, counts all the same."""
    found = [cycles(loop) for loop in loops(code) if any(map(overlaps, loop))]
    return min(found, default=None)  # by the first field
