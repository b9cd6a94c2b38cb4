"""Writes the README's results from committed JSON: `python -m benchmarks.readme_table [--check]`.

Everything between the markers in README.md comes from the newest cpu-*.json and train-*.json in
benchmarks/results/, never from a hand. `--check` fails if the README is not what the files say.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def newest(pattern: str) -> dict | None:
    documents = [
        json.loads(path.read_text()) for path in (ROOT / "benchmarks/results").glob(pattern)
    ]
    return max(documents, key=lambda d: d["machine"]["date"], default=None)


def conditions(document: dict) -> str:
    m, c = document["machine"], document["ceilings"]
    return (
        f"{m['cpu']}, {m['threads']} threads, {m['isa']}, torch {m['torch']}, {m['date'][:10]},"
        f" commit {m['commit']}; medians of interleaved calls through the public API; measured"
        f" ceilings {c['gemm_flops'] / 1e9:.0f} GFLOP/s (fp32 matrix product) and "
        f"{c['read_bytes'] / 1e9:.1f} GB/s (memory read)"
    )


def kernel_table(document: dict) -> str:
    lines = [
        "| | case | fp32 ms | PyTorch ms | **×** | bf16 ms | PyTorch ms | **×** |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    by_case: dict[tuple[str, str], dict[str, dict]] = {}
    for r in document["results"]:
        by_case.setdefault((r["suite"], r["case"]), {})[r["dtype"]] = r
    for (suite, case), dtypes in by_case.items():
        cells = [suite, case]
        for dtype in ("float32", "bfloat16"):
            if (r := dtypes.get(dtype)) is None:
                cells += ["", "", ""]
            else:
                ours, theirs = (1e3 * r["seconds"][name]["median"] for name in ("ours", "torch"))
                cells += [f"{ours:.2f}", f"{theirs:.2f}", f"**{r['ratio']:.2f}**"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def train_table(document: dict) -> str:
    (r,) = document["results"]
    lines = [
        f"| {r['case']} | ms a step | peak memory above weights, gradients, optimizer |",
        "|---|---:|---:|",
    ]
    for name, label in (("ours", "fastattn"), ("torch", "torch SDPA + F.cross_entropy")):
        ms, mib = 1e3 * r["seconds"][name]["median"], r["peak_bytes_above_state"][name] / 2**20
        lines.append(f"| {label} | {ms:.0f} | {mib:.0f} MiB |")
    return "\n".join(lines)


def render() -> str:
    parts = []
    for pattern, table in (("cpu-*.json", kernel_table), ("train-*.json", train_table)):
        if (document := newest(pattern)) is not None:
            parts.append(f"{table(document)}\n\n*{conditions(document)}.*")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    wanted = f"{before}{BEGIN}\n{render()}\n{END}{after}"
    if not args.check:
        readme.write_text(wanted)
    elif readme.read_text() != wanted:
        sys.exit(
            "README.md's results are not what benchmarks/results says:"
            " run python -m benchmarks.readme_table"
        )


if __name__ == "__main__":
    main()
