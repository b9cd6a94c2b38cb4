"""What can be said of the CUDA kernels' machine code without a GPU: `make gates`.

Compiles every kernel for every architecture and fails on what ptxas or the machine code betrays:
spills and local memory, more registers or static shared memory than the budget below, ptxas'
warnings about serialised instructions, and tensor core kernels without tensor core instructions.
"""

from __future__ import annotations

import collections
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent / "csrc" / "cuda"))
import nvcc
import pipe_cycles
from pipe_cycles import Instruction


class Budget(NamedTuple):
    registers: int  # a thread, at most
    shared: int = 0  # static shared memory, bytes; the dynamic one stands in the tile tables
    tensor_cores: bool = False  # but in instances that are named after plain arithmetic


# 65,536 registers an SM: 255 leave room for 8 warps, 128 for 16, 64 for 32.
BUDGET = {
    "attn_bwd_clear_kernel": Budget(28),
    "attn_bwd_dkv_kernel": Budget(255, tensor_cores=True),
    "attn_bwd_dq_kernel": Budget(255, tensor_cores=True),
    "attn_bwd_dq_repair_kernel": Budget(110),
    "attn_bwd_dq_store_kernel": Budget(28),
    "attn_bwd_dsinks_kernel": Budget(70),
    "attn_bwd_prep_kernel": Budget(40),
    "attn_bwd_sm90_kernel": Budget(168),
    "attn_entropy_kernel": Budget(130),
    "attn_fwd_fp32_kernel": Budget(255),
    "attn_fwd_kernel": Budget(255, tensor_cores=True),
    "attn_fwd_sm90_kernel": Budget(168),  # as it starts: 384 threads, or 512 of 128
    "attn_decode_kernel": Budget(168),
    "attn_decode_mma_kernel": Budget(255, tensor_cores=True),
    "attn_decode_combine_kernel": Budget(64),
    "cache_append_kernel": Budget(58),
    "cross_entropy_kernel": Budget(64),
}


# Bytes that may be spilled, by instance. On a T4 with head dims above 192, O, dQ or dK of 16 rows
# are 128 registers of a thread, and smaller tiles of keys spill as much.
EXCUSED = {r"Sm75, fp16>?, 256": 270}


# Their results leave 16 bytes at a time, where those are aligned.
WIDE_STORES = {
    "attn_bwd_dkv_kernel", "attn_bwd_dq_kernel", "attn_bwd_sm90_kernel", "attn_fwd_kernel",
    "attn_fwd_sm90_kernel",
}  # fmt: skip


class Hopper(NamedTuple):
    """Of a kernel of sm_90a by head dim and scores: 0 is plain, 1 rich."""

    groups: int  # wgmma.commit_group in its source, unrolled
    loop: int  # instructions of its loops over blocks; tests/pipe_cycles.py says what they mean
    # And of the way through when no option is on and nothing is at an edge; 0 where consumers have
    # a loop each. (The loops themselves hold the code of all options, in the backward twice.)
    path: int = 0


HOPPER = {
    "attn_bwd_sm90_kernel<64, 0>": Hopper(5, 1470, 1005),
    "attn_bwd_sm90_kernel<64, 1>": Hopper(5, 16150, 1240),
    "attn_bwd_sm90_kernel<128, 0>": Hopper(5, 1070, 740),
    "attn_bwd_sm90_kernel<128, 1>": Hopper(5, 8450, 860),
    "attn_bwd_sm90_kernel<192, 0>": Hopper(8, 1655),
    "attn_bwd_sm90_kernel<192, 1>": Hopper(7, 9960, 760),
    "attn_bwd_sm90_kernel<256, 0>": Hopper(9, 1900),
    "attn_bwd_sm90_kernel<256, 1>": Hopper(8, 10220, 820),
    "attn_fwd_sm90_kernel<64, 0>": Hopper(4, 680, 465),
    "attn_fwd_sm90_kernel<64, 1>": Hopper(4, 5470, 545),
    "attn_fwd_sm90_kernel<96, 0>": Hopper(4, 715, 495),
    "attn_fwd_sm90_kernel<96, 1>": Hopper(4, 5500, 580),
    "attn_fwd_sm90_kernel<128, 0>": Hopper(4, 745, 525),
    "attn_fwd_sm90_kernel<128, 1>": Hopper(4, 4890, 565),
    "attn_fwd_sm90_kernel<192, 0>": Hopper(4, 705, 510),
    "attn_fwd_sm90_kernel<192, 1>": Hopper(4, 3690, 545),
    "attn_fwd_sm90_kernel<256, 0>": Hopper(4, 630, 485),
    "attn_fwd_sm90_kernel<256, 1>": Hopper(4, 3115, 560),
}


# On the way through the loop over blocks of kernels of single warps, by head dim and scores: cycles
# of the pipe that is busy longest, which is named behind, as tests/pipe_cycles.py adds them up.
# Where that is the issue of instructions, there is some slack for what ptxas thinks of next.
HOT_PATH = {
    "attn_bwd_dkv_kernel<64, 0, 0>": {"sm_75": 1024, "sm_80": 664},  # tensor, shared
    "attn_bwd_dkv_kernel<64, 1, 0>": {"sm_75": 1024, "sm_80": 664},  # tensor, shared
    "attn_bwd_dkv_kernel<128, 0, 0>": {"sm_75": 1024, "sm_80": 1496},  # tensor, shared
    "attn_bwd_dkv_kernel<128, 1, 0>": {"sm_75": 1024, "sm_80": 1496},  # tensor, shared
    "attn_bwd_dkv_kernel<256, 0, 1>": {"sm_75": 1568, "sm_80": 1592},  # shared, shared
    "attn_bwd_dkv_kernel<256, 0, 2>": {"sm_75": 1040, "sm_80": 1064},  # shared, shared
    "attn_bwd_dkv_kernel<256, 1, 1>": {"sm_75": 1568, "sm_80": 1592},  # shared, shared
    "attn_bwd_dkv_kernel<256, 1, 2>": {"sm_75": 1040, "sm_80": 1064},  # shared, shared
    "attn_bwd_dq_kernel<64, 0>": {"sm_75": 768, "sm_80": 472},  # tensor, shared
    "attn_bwd_dq_kernel<64, 1>": {"sm_75": 768, "sm_80": 485},  # tensor, issue
    "attn_bwd_dq_kernel<128, 0>": {"sm_75": 768, "sm_80": 472},  # tensor, shared
    "attn_bwd_dq_kernel<128, 1>": {"sm_75": 768, "sm_80": 472},  # tensor, shared
    "attn_bwd_dq_kernel<256, 0>": {"sm_75": 1536, "sm_80": 1560},  # tensor, shared
    "attn_bwd_dq_kernel<256, 1>": {"sm_75": 1536, "sm_80": 1560},  # tensor, shared
    "attn_decode_mma_kernel<64, 0>": {"sm_75": 480, "sm_80": 450},  # issue, issue
    "attn_decode_mma_kernel<64, 1>": {"sm_75": 530, "sm_80": 500},  # issue, issue
    "attn_decode_mma_kernel<128, 0>": {"sm_75": 615, "sm_80": 570},  # issue, issue
    "attn_decode_mma_kernel<128, 1>": {"sm_75": 680, "sm_80": 635},  # issue, issue
    "attn_fwd_kernel<64, 0>": {"sm_75": 1024, "sm_80": 1024},  # tensor, tensor
    "attn_fwd_kernel<64, 1>": {"sm_75": 1024, "sm_80": 616},  # tensor, shared
    "attn_fwd_kernel<96, 0>": {"sm_75": 1536, "sm_80": 1536},  # tensor, tensor
    "attn_fwd_kernel<96, 1>": {"sm_75": 1536, "sm_80": 904},  # tensor, shared
    "attn_fwd_kernel<128, 0>": {"sm_75": 1024, "sm_80": 2048},  # tensor, tensor
    "attn_fwd_kernel<128, 1>": {"sm_75": 1024, "sm_80": 1320},  # tensor, shared
    "attn_fwd_kernel<192, 0>": {"sm_75": 768, "sm_80": 904},  # tensor, shared
    "attn_fwd_kernel<192, 1>": {"sm_75": 768, "sm_80": 1096},  # tensor, shared
    "attn_fwd_kernel<256, 0>": {"sm_75": 1024, "sm_80": 1448},  # tensor, shared
    "attn_fwd_kernel<256, 1>": {"sm_75": 1024, "sm_80": 1448},  # tensor, shared
}
# Loads of less than 16 bytes on that way: lse and delta of a query, pages of 6 keys and values.
NARROW = {"attn_bwd_dkv_kernel": 2, "attn_decode_mma_kernel": 6}


class Kernel(NamedTuple):
    """One kernel as compiled for one architecture."""

    symbol: str
    arch: str  # sm_80
    registers: int
    shared: int
    stack: int
    spills: int


# --- ptxas' report --------------------------------------------------------------------------------

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
# C7504 … C7520: setmaxnreg ignored, wgmma serialised; C7602: too few registers.
COMPLAINT = re.compile(r"\(C7[56]\d\d\)")


def kernels_of(log: Path) -> Iterator[Kernel]:
    for part in log.read_text().split("Compiling entry function '")[1:]:
        part = "Compiling entry function '" + part
        entry, stack, used = ENTRY.search(part), STACK.search(part), USED.search(part)
        assert entry and stack and used, f"{log} has an entry that this script can't read:\n{part}"
        shared = SHARED.search(part)
        frame, stores, loads = map(int, stack.groups())
        yield Kernel(
            *entry.groups(), int(used[1]), int(shared[1]) if shared else 0, frame,
            stores + loads,
        )  # fmt: skip


def complaints(log: Path) -> list[str]:
    return [line.strip() for line in log.read_text().splitlines() if COMPLAINT.search(line)]


def readable(symbols: list[str]) -> dict[str, str]:
    """C++ names of mangled ones, without namespaces and parameters."""
    listed = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    )
    names = {}
    for symbol, name in zip(symbols, listed.stdout.splitlines(), strict=True):
        name = re.sub(r"(\w+::)+|\(anonymous namespace\)::", "", name).removeprefix("void ")
        names[symbol] = re.sub(r"\(\w+\)(?=\d)", "", name).rsplit("(", 1)[0]
    return names


# --- machine code ---------------------------------------------------------------------------------


def find_tool(name: str) -> str | None:
    """On PATH, beside nvcc, or from NVIDIA's packages, such as nvidia-cuda-cuobjdump."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    folders = [str(Path(nvcc.find() or "").parent), *map(str, packages.glob("*/bin"))]
    return shutil.which(name) or shutil.which(name, path=":".join(folders))


def machine_code(cuobjdump: str, file: Path) -> dict[tuple[str, str], list[Instruction]]:
    """By symbol and architecture."""
    path = {"PATH": f"{Path(cuobjdump).parent}:/usr/bin:/bin"}  # cuobjdump calls nvdisasm
    command = [cuobjdump, "-sass", str(file)]
    text = subprocess.run(command, env=path, capture_output=True, text=True, check=True).stdout
    found: dict[tuple[str, str], list[Instruction]] = {}
    arch, code = "", list[Instruction]()
    for line in text.splitlines():
        if line.startswith("arch ="):
            arch = line.split("=")[1].strip()
        elif "Function :" in line:
            code = found.setdefault((line.split(":")[1].strip(), arch), [])
        elif (instruction := pipe_cycles.parse(line)) is not None:
            code.append(instruction)
    return found


def counted(code: list[Instruction]) -> collections.Counter[str]:
    """How often each instruction (HMMA, LDL …) occurs, and products that signal a barrier."""
    ops = collections.Counter(instruction.opcode.split(".")[0] for instruction in code)
    ops["gsb0"] = sum(i.opcode.startswith("HGMMA") and "gsb0" in i.operands for i in code)
    return ops


# --- the gate -------------------------------------------------------------------------------------


def faults(kernel: Kernel, name: str, code: list[Instruction] | None) -> list[str]:
    budget = BUDGET.get(name.split("<")[0])
    if budget is None:
        return ["no row in the budget of tests/gates.py"]
    found = []
    if kernel.registers > budget.registers:
        found.append(f"{kernel.registers} registers, {budget.registers} at most")
    if kernel.shared > budget.shared:
        found.append(f"{kernel.shared} bytes of static shared memory, {budget.shared} at most")
    excused = next((n for text, n in EXCUSED.items() if re.search(text, name)), 0)
    if kernel.spills > excused or (kernel.stack and not excused):
        found.append(f"{kernel.spills} bytes spilled, {kernel.stack} bytes of stack")
    if code is not None:
        ops = counted(code)
        if (local := ops["LDL"] + ops["STL"]) and not excused:
            found.append(f"{local} accesses to local memory")
        arithmetic = "MultiplyAdd" in name
        if budget.tensor_cores and not arithmetic and not ops["HMMA"] + ops["HGMMA"]:
            found.append("no tensor core instruction")
        wide = any(i.opcode.startswith("STG") and ".128" in i.opcode for i in code)
        if name.split("<")[0] in WIDE_STORES and not arithmetic and not wide:
            found.append("no stores of 16 bytes")
        if budget.tensor_cores and kernel.arch in pipe_cycles.RATES:
            found += path_faults(kernel.arch, name, code)
        if "_sm90_kernel" in name:
            found += hopper_faults(name, code, ops) + pool_faults(kernel.registers, code)
    return found


def hopper_faults(name: str, code: list[Instruction], ops: collections.Counter[str]) -> list[str]:
    """Products that run beside each other signal a barrier once a group; where ptxas has put them
    one after another, each does. TMA and the registers' moving are there or have been lost."""
    loops = pipe_cycles.hot_loops(code)
    for loop in loops:
        print(f"  a loop over blocks: {loop}")
    row = HOPPER.get(re.sub(r"(bf|fp)16, ", "", name))
    if row is None:
        return ["no row in HOPPER of tests/gates.py"]
    found = []
    if ops["gsb0"] != row.groups:
        found.append(f"{ops['gsb0']} of {ops['HGMMA']} products are waited for, not {row.groups}")
    if not loops:
        found.append("no loop that computes while products run")
    if (count := sum(loop.instructions for loop in loops)) > row.loop:
        found.append(f"{count} instructions in loops over blocks, {row.loop} at most")
    path = pipe_cycles.cycles(pipe_cycles.hot_path(code) or ())
    print(f"  the way through: {path}")
    if path.instructions > row.path:
        found.append(f"{path.instructions} instructions on the way through, {row.path} at most")
    if ops["HMMA"]:
        found.append(f"{ops['HMMA']} products of a warp alone")
    return found + [f"no {op}" for op in ("UTMALDG", "USETMAXREG") if not ops[op]]


def pool_faults(registers: int, code: list[Instruction]) -> list[str]:
    """Consumers wait for ever for registers that a block of threads did not start with: it has what
    ptxas says, a thread, and one warpgroup is the producer."""
    given, taken = (
        [
            int(i.operands.split(",")[-1], 16)
            for i in code
            if i.opcode.startswith(f"USETMAXREG.{op}")
        ]
        for op in ("DEALLOC", "TRY_ALLOC")
    )
    if not given or not taken:
        return ["setmaxnreg is not there twice"]
    warpgroups = 65536 // (128 * registers)  # the block is alone on its SM
    if (wanted := max(given) + (warpgroups - 1) * max(taken)) > warpgroups * registers:
        return [f"{wanted} registers in {warpgroups} warpgroups of {registers} each: it hangs"]
    return []


def path_faults(arch: str, name: str, code: list[Instruction]) -> list[str]:
    path = pipe_cycles.hot_path(code)
    if path is None:
        return []
    cycles = pipe_cycles.path_cycles(path, pipe_cycles.RATES[arch])
    pipe, busy = cycles.bound
    print(f"  the way through the loop over blocks, bound by {pipe}: {cycles}")
    found = []
    if not cycles.wide or cycles.narrow > NARROW.get(name.split("<")[0], 0):
        found.append(f"{cycles.wide} loads of 16 bytes and {cycles.narrow} shorter ones")
    row = HOT_PATH.get(re.sub(r"TensorCores<Sm\d+, \w+>, |Sm\d+, \w+, ", "", name))
    if row is None:
        return [*found, "no row in HOT_PATH of tests/gates.py"]
    if busy > row.get(arch, busy):
        found.append(f"{busy} cycles of {pipe}, {row[arch]} at most")
    return found


def check(logs: list[Path]) -> tuple[int, int]:
    """Prints a row a kernel, and what is wrong with it: (kernels, how many of them failed)."""
    cuobjdump = find_tool("cuobjdump")
    count = failed = 0
    print(f"{'kernel':<64} {'arch':<8} {'regs':>4} {'smem':>6} {'HMMA':>5}")
    for log in logs:
        kernels = list(kernels_of(log))
        names = readable([kernel.symbol for kernel in kernels])
        sass = machine_code(cuobjdump, log.with_suffix("")) if cuobjdump and kernels else {}
        for kernel in sorted(kernels, key=lambda k: (names[k.symbol], len(k.arch), k.arch)):
            name, code = names[kernel.symbol], sass.get((kernel.symbol, kernel.arch))
            assert code or not cuobjdump, f"cuobjdump shows no {name} for {kernel.arch}"
            mma = "" if code is None else sum(i.opcode[:4] in ("HMMA", "HGMM") for i in code)
            row = f"{name:<64} {kernel.arch:<8} {kernel.registers:>4}"
            print(f"{row} {kernel.shared:>6} {mma:>5}")
            found = faults(kernel, name, code)
            for fault in found:
                print(f"  FAILED: {fault}")
            count += 1
            failed += bool(found)
        for line in complaints(log):
            print(f"  FAILED: {line}")
            failed += 1
    if cuobjdump is None:
        print("gates: no cuobjdump (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm),")
        print("       so the machine code itself was not looked at")
    return count, failed


def main() -> int:
    if nvcc.find() is None:
        print("gates: skipped, there is no nvcc in CUDA_HOME or on PATH")
        return 0
    count, failed = check(nvcc.build(None))
    print(f"gates: {count} kernels, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
