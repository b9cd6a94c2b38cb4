"""How long a loop of machine code keeps each pipe of an SM busy: a model, by the rates that NVIDIA
states for an SM's quarter. It ranks variants and shows what grows; it predicts no time.

An iteration of a consumer warpgroup of Hopper's is one warp a quarter. What its other pipes need
has to fit beside the tensor cores' cycles of all consumers. Kernels of single warps have one in
each quarter too, and the four share the way to shared memory and L1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
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
    turns = [i for i, to in enumerate(after) if to != [i + 1]]
    starts = {0, *(j for i in turns for j in after[i]), *(i + 1 for i in turns)} - {len(code)}
    blocks = [range(a, b) for a, b in pairwise(sorted({*starts, len(code)}))]
    block_of = {block[0]: number for number, block in enumerate(blocks)}
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


# --- kernels of single warps ----------------------------------------------------------------------


class Rates(NamedTuple):
    """Of a quarter of an SM."""

    macs: int  # multiply-adds of 16-bit elements a cycle, summed in fp32
    fp32: int  # cycles a warp's multiply-add takes


RATES = {"sm_75": Rates(128, 2), "sm_80": Rates(256, 2), "sm_89": Rates(128, 1)}
HMMA = re.compile(r"HMMA\.(1688|16816)\.F32")
FP32 = re.compile(r"(FFMA|FMUL|FADD|IMAD)\b")
MEMORY = re.compile(r"(LDSM|LDS|STS|LDG|STG|LDGSTS|SHFL)\b")
GAP = 8  # instructions between products that tensor cores are busy with the one before for


class Path(NamedTuple):
    """Cycles of a quarter, of one iteration of a warp in each."""

    issue: int
    tensor: int
    mufu: int
    alu: int
    fp32: int
    shared: int  # and L1: of the four warps
    products: int
    gaps: int  # between products, longer than GAP
    wide: int  # loads of 16 bytes from global memory
    narrow: int  # shorter ones

    @property
    def pipes(self) -> dict[str, int]:
        return dict(zip(self._fields[:6], self[:6], strict=True))

    @property
    def bound(self) -> tuple[str, int]:
        return max(self.pipes.items(), key=lambda pipe: pipe[1])

    def __str__(self) -> str:
        busy = ", ".join(f"{name} {value}" for name, value in self.pipes.items())
        return (
            f"cycles: {busy}; {self.products} products in {self.gaps + 1} runs,"
            f" {self.wide} loads of 16 bytes, {self.narrow} shorter"
        )


def wavefronts(opcode: str) -> int:
    """128 bytes each, of a warp's access without conflicts."""
    if opcode.startswith("LDSM"):
        return int(opcode[-1]) if opcode[-2] == "." else 1
    return 4 if ".128" in opcode else 2 if ".64" in opcode else 1


def path_cycles(path: list[Instruction], rates: Rates) -> Path:
    count = dict.fromkeys(Path._fields, 0)
    since = 0
    for instruction in path:
        opcode = instruction.opcode
        count["issue"] += 1
        since += 1
        if (product := HMMA.match(opcode)) is not None:
            count["tensor"] += 16 * 8 * (8 if product[1] == "1688" else 16) // rates.macs
            count["gaps"] += count["products"] > 0 and since > GAP
            count["products"] += 1
            since = 0
        count["mufu"] += MUFU * opcode.startswith(("MUFU", "F2F."))
        count["alu"] += ALU * (ALU_OPCODES.match(opcode) is not None)
        count["fp32"] += rates.fp32 * (FP32.match(opcode) is not None)
        count["shared"] += 4 * wavefronts(opcode) * (MEMORY.match(opcode) is not None)
        if opcode.startswith("LDG") and not opcode.startswith("LDGDEPBAR"):
            count["wide" if ".128" in opcode else "narrow"] += 1
    return Path(**count)


def hot_path(code: list[Instruction]) -> list[Instruction] | None:
    """The way through the loop over blocks when no option is on and nothing is at an edge: of the
    smallest loop with half of the kernel's products that with most of them and of copies, and then
    the shortest. None where there are no products."""

    def work(instructions: Iterable[int], kind: Callable[[Instruction], bool]) -> int:
        return sum(kind(code[i]) for i in instructions)

    products = work(range(len(code)), is_product)
    enough = [loop for loop in natural_loops(code) if 2 * work(loop, is_product) >= products > 0]
    if not enough:
        return None
    loop = min(enough, key=len)
    index = {instruction.address: i for i, instruction in enumerate(code)}
    after = [list(_successors(code, i, index)) for i in range(len(code))]
    entries = (j for i, to in enumerate(after) if i not in loop for j in to if j in loop)
    head = next(entries, min(loop))
    Way = tuple[int, int, list[int]]  # work, −length, indices
    known: dict[int, Way | None] = {}

    def best_way(start: int) -> Way | None:
        """To the head, and not around a loop within."""
        if start not in known:
            known[start] = None
            run = [start]
            while len(after[run[-1]]) == 1 and after[run[-1]] != [head]:
                run += after[run[-1]]
            ways: list[Way | None] = [
                (0, 0, []) if j == head else best_way(j) for j in after[run[-1]] if j in loop
            ]
            found = [way for way in ways if way is not None]
            if found:
                most, length, rest = max(found, key=lambda way: way[:2])
                known[start] = (most + work(run, is_work), length - len(run), run + rest)
        return known[start]

    way = best_way(head)
    assert way is not None, "the loop's end is not reached"
    return [code[i] for i in way[2]]


def is_product(instruction: Instruction) -> bool:
    return instruction.opcode.startswith(("HMMA", "HGMMA"))


def is_work(instruction: Instruction) -> bool:
    opcode = instruction.opcode
    return is_product(instruction) or (opcode.startswith("LDG") and ".128" in opcode)
