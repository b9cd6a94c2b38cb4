"""README.md's table: what the compiler and the model say of each rung, and what was measured."""

from __future__ import annotations

from pathlib import Path

from .. import results
from ..pages import markdown
from .model import bound, compiled
from .rungs import BF16, HERE, RUNGS, Rung

README = HERE / "README.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
HEAD_DIM = 128


def lines(folder: Path = results.RESULTS) -> list[str]:
    kinds = measured(folder)
    header = ["rung", "", "adds", "registers", "shared KiB", "products", "bound by", "TFLOP/s ≤"]
    rows = []
    for rung in RUNGS:
        code = compiled(rung, HEAD_DIM)
        assert code.spills == 0, f"{rung.stem} spills {code.spills} bytes"
        unit, flops = bound(rung, HEAD_DIM, code) if code.products else ("no cuobjdump", 0.0)
        rows.append([
            f"[{rung.stem}]({rung.stem}.cu)",
            "bf16" if rung.dtype == BF16 else "fp32",
            rung.adds,
            str(code.registers),
            f"{code.shared / 1024:.0f}",
            code.mix,
            unit,
            f"{flops / 1e12:.3g}",
            *(found.get(rung.stem, "") for found in kinds.values()),
        ])  # fmt: skip
    header += list(kinds) or ["measured"]
    for row in rows:
        row += [] if kinds else ["not yet"]
    return markdown(header, 3, rows).splitlines()


def measured(folder: Path) -> dict[str, dict[str, str]]:
    """By the kind of machine and rung: TFLOP/s, and the share of the floor."""
    kinds = {}
    for kind, files in results.by_kind(results.read_all([folder])).items():
        found = {}
        for _, document in files:
            for result in document["results"]:
                if result["suite"] == "ladder" and f"D{HEAD_DIM}" in result["case"].split():
                    found |= {r.stem: cell for r in RUNGS if (cell := cell_of(result, r))}
        if found:
            kinds[kind] = found
    return kinds


def cell_of(result: dict, rung: Rung) -> str | None:
    peer = results.timed(result).get(rung.peer)
    if peer is None:
        return None
    share = peer.get("share_of_floor")
    flops = f"{result['flops'] / peer['seconds']['median'] / 1e12:.3g}"
    return flops + (f" ({share:.0%})" if share else "")


def write() -> Path:
    before, rest = README.read_text().split(BEGIN)
    _, after = rest.split(END)
    README.write_text("\n".join([f"{before}{BEGIN}", *lines(), f"{END}{after}"]))
    return README
