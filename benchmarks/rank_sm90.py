"""Which tile on Hopper is fastest: compiles variants, times them, prints a ranking.

    python benchmarks/rank_sm90.py 128 --seqlen 16384 --causal      (an H100 or H200, and nvcc)
    python benchmarks/rank_sm90.py 256 --backward
    python benchmarks/rank_sm90.py 128 --compile-only               (any machine with nvcc)

A variant is csrc/ with a few words replaced: another row of csrc/cuda/tiles_sm90.cuh, more buffers,
no turns, another order of work. Each is one executable; they run in turns, several rounds, and the
median counts. What ptxas complains of, or does not fit, is said in place of a time.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent / "csrc" / "cuda"))
import nvcc
import wgmma

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "rank_sm90"
TILES, ORDER = "tiles_sm90.cuh", "work_order.cuh"
FORWARD, BACKWARD = "attn_fwd_sm90.cuh", "attn_bwd_sm90.cuh"


class Variant(NamedTuple):
    name: str
    edits: tuple[
        tuple[str, str, str], ...
    ] = ()  # file of csrc/cuda, what stands there once, by what


def tile_row(head_dim: int, pattern: str) -> re.Match[str]:
    """Of the tile table."""
    row = re.search(pattern, (ROOT / "csrc" / "cuda" / TILES).read_text())
    if row is None:
        raise SystemExit(f"rank_sm90: {TILES} has no row for head dim {head_dim}")
    return row


def backward_variants(head_dim: int) -> list[Variant]:
    now = tile_row(head_dim, rf"return \{{{head_dim}, (\d+), (\d+), (\d)\}};")[0]
    found = [Variant("as it is")]
    for keys, queries, stages in itertools.product((64, 128), (64, 128), (1, 2)):
        new = f"return {{{head_dim}, {keys}, {queries}, {stages}}};"
        if new != now:
            name = f"{keys} keys, {queries} queries, {stages} of dO"
            found.append(Variant(name, ((TILES, now, new),)))
    first = "ascending = !b.deterministic"
    found.append(Variant("last keys first", ((BACKWARD, first, "ascending = false"),)))
    return found + sections()


def sections() -> list[Variant]:
    """How much of K and V, or Q, the heads in flight hold."""
    return [
        Variant(f"sections of {megabytes} MB", ((ORDER, "16 << 20", f"{megabytes} << 20"),))
        for megabytes in (8, 32)
    ]


def forward_variants(head_dim: int) -> list[Variant]:
    row = tile_row(head_dim, rf"\{{{head_dim}, (\d), (\d+)\}},  +//")
    now = row[0]
    tiles = [(c, n) for c in (2, 3) for n in (64, 80, 96, 112, 128, 144, 160, 176)]
    tiles.remove((int(row[1]), int(row[2])))
    found = [Variant("as it is")]
    found += [
        Variant(f"{c} consumers, {n} keys", ((TILES, now, f"{{{head_dim}, {c}, {n}}},  //"),))
        for c, n in tiles
    ]
    if head_dim <= 128:
        turns = ((FORWARD, "kHeadDim <= 128, Turns", "false, Turns"),)
        found.append(Variant("no turns", turns))
    stages = "static constexpr int kStages = 2;"
    found.append(Variant("3 buffers", ((TILES, stages, stages.replace("2", "3")),)))
    there_and_back = "round % 2 == 0 ? block : blocks - 1 - block"
    found.append(Variant("rounds all one way", ((ORDER, there_and_back, "block"),)))
    return found + sections()


def apply(variant: Variant, sources: Path) -> None:
    for file, old, new in variant.edits:
        text = (sources / file).read_text()
        if text.count(old) != 1:
            raise SystemExit(f"rank_sm90: {old!r} stands in {file} {text.count(old)} times")
        (sources / file).write_text(text.replace(old, new))


def compiled(variant: Variant, head_dim: int, backward: bool) -> Path | str:
    """The executable, or why there is none."""
    pass_ = "backward" if backward else "forward"
    folder = FOLDER / f"{pass_} {head_dim} {variant.name}".replace(" ", "-").replace(",", "")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    sources = folder / "csrc" / "cuda"
    apply(variant, sources)
    wgmma.write(folder / "wgmma.cuh", sorted({*wgmma.COLUMNS, 144, 160, 176}))
    program = folder / "rank_sm90"
    command = [nvcc.find(), "-std=c++17", "-O3", "-Xptxas=-v", f"-DHEAD_DIM={head_dim}"]
    command += [f"-DBACKWARD={int(backward)}"]
    command += ["-gencode=arch=compute_90a,code=sm_90a", f"-I{folder}", f"-I{sources}"]
    command += ["-o", str(program), str(ROOT / "benchmarks" / "rank_sm90.cu")]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        return next((line for line in done.stderr.splitlines() if "error" in line), "?").strip()
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", done.stderr)]
    if complaint := re.search(r"\(C7[56]\d\d\).*", done.stderr):
        return complaint[0]
    return f"{sum(spills)} bytes spilled" if any(spills) else program


def measured(program: Path, shape: list[str]) -> tuple[float, list[float]]:
    """A checksum, and milliseconds."""
    done = subprocess.run([str(program), *shape], capture_output=True, text=True, check=True)
    checksum, *times = map(float, done.stdout.split())
    return checksum, times


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("head_dim", type=int, choices=(64, 96, 128, 192, 256))
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--seqlen", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=16384, help="in all sequences together")
    parser.add_argument("--heads", type=int, nargs=2, metavar=("Q", "K"))
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile-only", action="store_true")
    a = parser.parse_args()
    if nvcc.find() is None:
        raise SystemExit("rank_sm90: there is no nvcc in CUDA_HOME or on PATH")
    heads_q, heads_k = a.heads or (2048 // a.head_dim, 2048 // a.head_dim)
    batch = max(1, a.tokens // a.seqlen)
    shape = [str(n) for n in (batch, heads_q, heads_k, a.seqlen, int(a.causal), 10)]
    programs: dict[str, Path] = {}
    variants = backward_variants if a.backward else forward_variants
    for variant in variants(a.head_dim):
        result = compiled(variant, a.head_dim, a.backward)
        if isinstance(result, Path):
            programs[variant.name] = result
        print(
            f"{variant.name:<28} {'compiled' if isinstance(result, Path) else result}", flush=True
        )
    if a.compile_only:
        return 0
    times: dict[str, list[float]] = {name: [] for name in programs}
    checksums: dict[str, float] = {}
    for _ in range(a.rounds):
        for name, program in programs.items():
            checksums[name], some = measured(program, shape)
            times[name] += some
    flops = (
        (10 if a.backward else 4)
        * batch
        * heads_q
        * a.seqlen**2
        * a.head_dim
        / (2 if a.causal else 1)
    )
    median = {name: statistics.median(some) for name, some in times.items()}
    print(f"\nD {a.head_dim}, B {batch}, S {a.seqlen}, H {heads_q}/{heads_k}, causal {a.causal}")
    for name in sorted(median, key=lambda name: median[name]):
        off = abs(checksums[name] / checksums["as it is"] - 1)
        wrong = "" if off < 1e-3 else f"  WRONG: outputs differ by {off:.1e}"
        print(f"{flops / median[name] / 1e9:8.1f} TFLOP/s {median[name]:9.4f} ms  {name}{wrong}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
