"""How long a loop of machine code keeps each pipe of an SM of Hopper busy: a model, by the rates
NVIDIA states for an SM's quarter. It ranks variants and shows what grows; it predicts no time.

An iteration of a consumer warpgroup is one warp a quarter. What its other pipes need has to fit
beside the tensor cores' cycles of all consumers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple


class Instruction(NamedTuple):
    address: int
    opcode: str  # such as HGMMA.64x128x16.F32.BF16
    operands: str
    conditional: bool = False  # by a predicate


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
LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z0-9][\w.]*)(.*);")
HGMMA = re.compile(r"HGMMA\.64x(\d+)x16")
MACS = 2048  # dense multiply-adds of 16-bit elements a cycle, in the whole SM
# Cycles a warp's instruction takes: 4 lanes at a time, or 16.
MUFU, ALU = 8, 2
ALU_OPCODES = re.compile(
    r"(FMNMX|FSETP|ISETP|LOP3|SEL|FSEL|IMNMX|VIMNMX|PRMT|SHF|IADD3|LEA|PLOP3|VIADD|F2FP)\b"
)


def parse(line: str) -> Instruction | None:
    found = LINE.match(line)
    if found is None:
        return None
    return Instruction(int(found[1], 16), found[3], found[4], found[2] is not None)


def cycles(instructions: Iterable[Instruction]) -> Cycles:
    count, tensor, mufu, alu = 0, 0.0, 0.0, 0.0
    for _, opcode, *_ in instructions:
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


def hot_loops(code: list[Instruction]) -> list[Cycles]:
    """The loops that compute while products run, and have no such loop within: one, or one for each
    kind of consumer. Code that a branch mostly passes over, as that of masks, counts all the same.
    """
    hot = [loop for loop in natural_loops(code) if any(overlaps(code[i]) for i in loop)]
    inner = [loop for loop in hot if not any(other < loop for other in hot)]
    return [cycles(code[i] for i in sorted(loop)) for loop in sorted(inner, key=min)]


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    return [[code[i] for i in sorted(loop)] for loop in natural_loops(code)]


def natural_loops(code: list[Instruction]) -> list[frozenset[int]]:
    """Indices of instructions from which a branch goes back to one that all ways there pass. (Not
    all branches backwards: what is seldom run stands behind the rest, and goes back to it.)"""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    after = [list(_successors(code, i, index)) for i in range(len(code))]
    starts = sorted({0, *(j for i, to in enumerate(after) for j in to if to != [i + 1])})
    block_of = dict(zip(starts, range(len(starts)), strict=True))
    blocks = [range(a, b) for a, b in pairwise([*starts, len(code)])]
    flow = [[block_of[j] for j in after[block[-1]]] for block in blocks]
    dominators = _dominators(flow)
    bodies: dict[int, set[int]] = {}
    before: dict[int, list[int]] = {}
    for b, to in enumerate(flow):
        for target in to:
            before.setdefault(target, []).append(b)
    for b, to in enumerate(flow):
        for head in (target for target in to if dominators[b] >> target & 1):
            body, stack = bodies.setdefault(head, {head}), [b]
            while stack:
                if (block := stack.pop()) not in body:
                    body.add(block)
                    stack += before.get(block, [])
    return [frozenset(i for block in body for i in blocks[block]) for body in bodies.values()]


def _successors(code: list[Instruction], i: int, index: dict[int, int]) -> Iterator[int]:
    opcode, operands, conditional = code[i].opcode, code[i].operands.strip(), code[i].conditional
    target = re.search(r"0x([0-9a-f]+)$", operands)
    jumps = opcode.split(".")[0] == "BRA" and target is not None
    leaves = opcode.split(".")[0] in ("EXIT", "RET", "BRX")
    if jumps and target is not None and int(target[1], 16) in index:
        yield index[int(target[1], 16)]
        conditional = conditional or not operands.startswith("0x")  # such as BRA.U !UP0, 0x10
    if i + 1 < len(code) and (conditional or not (jumps or leaves)):
        yield i + 1


def _dominators(flow: list[list[int]]) -> list[int]:
    """Of each block those that every way to it passes, as bits. Blocks are nearly in order."""
    everything = (1 << len(flow)) - 1
    found = [1, *[everything] * (len(flow) - 1)]
    changed = True
    while changed:
        changed = False
        for b, to in enumerate(flow):
            for target in to:
                new = found[target] & (found[b] | 1 << target)
                changed |= new != found[target]
                found[target] = new
    return found
