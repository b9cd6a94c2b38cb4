"""Turns results files into pages: one self-contained HTML page, and the tables in the documents.

`report DIR… --html page.html` takes any files. `report` alone writes the committed results into
README.md, between its markers, and docs/performance.md; `--check` fails if they are not up to date.
No number in them comes from a hand.
"""

from __future__ import annotations

import argparse
import html
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from fastattn.files import replacing

from . import limits, plots, results
from .case import short
from .plots import by_suite
from .results import Document
from .show import cells_of, milliseconds, reasons
from .suites import SUITES
from .train_step import FORMULA

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
SLOWER = 1.03  # a peer that is faster by less is as fast

Kinds = dict[str, list[tuple[Path, Document]]]


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(prog="fastattn bench report", description=__doc__)
    p.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="default: the committed")
    p.add_argument("--html", type=Path, help="write one page with everything")
    p.add_argument("--check", action="store_true", help="only compare the documents")
    args = p.parse_args(argv)
    documents = results.read_all(args.folders or [results.RESULTS])
    if not documents:
        raise ValueError("no results file there")
    kinds = results.by_kind(documents)
    if args.html:
        save(args.html, page(kinds))
        print(f"wrote {args.html}")
    if args.folders:
        if not args.html:
            print(readme_tables(kinds))
        return 0
    readme, performance = ROOT / "README.md", ROOT / "docs" / "performance.md"
    wanted = {readme: in_readme(readme.read_text(), kinds), performance: performance_page(kinds)}
    stale = [p for p, text in wanted.items() if not p.exists() or p.read_text() != text]
    if args.check and stale:
        names = ", ".join(str(p.relative_to(ROOT)) for p in stale)
        print(f"{names}: not what benchmarks/results says; run `fastattn bench report`")
        return 1
    for path in stale:
        save(path, wanted[path])
        print(f"wrote {path}")
    return 0


def save(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())


# ---- words ---------------------------------------------------------------------------------------


def ceilings(document: Document) -> str:
    c = document["ceilings"]
    gemm = ", ".join(f"{short(name)} {x / 1e12:.3g}" for name, x in c["gemm_flops"].items())
    fma = f", fp32 multiply-adds in registers {c['fma_flops'] / 1e12:.3g}" if c["fma_flops"] else ""
    memory = f"memory {c['memory_bytes'] / 1e9:.3g} GB/s"
    return f"matrix products (TFLOP/s) {gemm}{fma}; {memory}"


def conditions(document: Document) -> str:
    m = document["machine"]
    if m["device"] == "cuda":
        where = f"{m['gpu']}, driver {m['driver']}, CUDA {m['cuda']}"
    else:
        where = f"{m['cpu']}, {m['threads']} threads, {m['isa']}"
    cut = "" if document["complete"] else "; cut by its time budget"
    return (
        f"{where}, torch {m['torch']}, {m['date'][:10]}, commit {m['commit']}{cut}. Medians of"
        f" interleaved calls; ceilings measured in the same run: {ceilings(document)}"
    )


def faster_peers(found: list[dict]) -> list[str]:
    """Where we are not the fastest, said plainly."""
    lines = []
    for result in found:
        mine, theirs = results.fastest(result, ours=True), results.fastest(result, ours=False)
        name = f"{result['case']} {short(result['dtype'])}"
        if mine is None and theirs is not None:
            lines.append(f"{name}: {theirs} takes it, ours does not")
        elif theirs is not None and (gain := results.ratio(result, theirs)) and gain < 1 / SLOWER:
            lines.append(f"{name}: {theirs} is {1 / gain:.2f}× faster")
    return lines


def reached(found: list[dict]) -> str:
    """ "56–91 % of the floor", ours."""
    shares = [
        r["peers"][mine]["share_of_floor"]
        for r in found
        if (mine := results.fastest(r, ours=True)) and r["floor_seconds"]
    ]
    if not shares:
        return ""
    low, high = (f"{100 * x:.0f}" for x in (min(shares), max(shares)))
    return f"{low} %" if low == high else f"{low}–{high} %"


def markdown(header: list[str], rows: list[list[str]], right: int) -> str:
    """A table whose columns from `right` on are aligned right."""
    rule = ["---" if i < right else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


# ---- README.md -----------------------------------------------------------------------------------


def in_readme(text: str, kinds: Kinds) -> str:
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{readme_tables(kinds)}\n{END}{after}"


def readme_tables(kinds: Kinds) -> str:
    """A table of the most telling cases (rank 0) a kind of machine: the newest, others folded."""
    parts = []
    for files in kinds.values():
        rows, used = [], []
        for _, document in files:
            telling = [r for r in document["results"] if r["rank"] == 0 and results.ratio(r)]
            rows += [(SUITES.index(r["suite"]), readme_row(r)) for r in telling]
            used += [document] if telling else []
        if not rows:
            continue
        rows.sort(key=lambda pair: pair[0])
        header = ["", "case", "", "ms", "peer's", "**×**", "floor", "error", "peer's"]
        header += ["MiB", "peer's"]
        table = markdown(header, [row for _, row in rows], right=3)
        table += "".join(f"\n\n*{conditions(d)}.*" for d in used)
        if parts:
            title = plots.title(files[0][1])
            table = f"<details>\n<summary>{title}</summary>\n\n{table}\n\n</details>"
        else:
            table += readme_picture(files)
        parts.append(table)
    return "\n\n".join(parts)


def readme_picture(files: list[tuple[Path, Document]]) -> str:
    """The newest of the first suite that was drawn."""
    drawn = (plots.picture_path(path, SUITES[0]) for path, _ in files)
    found = next((path for path in drawn if path.exists()), None)
    return f"\n\n![{SUITES[0]}]({os.path.relpath(found, ROOT)})" if found else ""


def readme_row(result: dict) -> list[str]:
    mine, baseline = results.fastest(result, ours=True), result["baseline"]
    assert mine is not None
    peer = result["peers"][mine]
    both = peer, result["peers"][baseline]
    errors, peaks = ([results.error(p) for p in both], [p.get("peak_bytes") for p in both])
    return [
        result["suite"],
        result["case"],
        short(result["dtype"]),
        milliseconds(results.median(result, mine)),
        milliseconds(results.median(result, baseline)),
        f"**{results.ratio(result):.2f}**",
        f"{peer['share_of_floor']:.0%}" if peer.get("share_of_floor") else "",
        *("" if e is None else f"{e:.1e}" for e in errors),
        *("" if b is None else f"{b / 2**20:.0f}" for b in peaks),
    ]


# ---- docs/performance.md -------------------------------------------------------------------------

PERFORMANCE = """# Performance

Made by `fastattn bench report` from benchmarks/results; [benchmarks/](../benchmarks/README.md) has
the method. Times are medians in milliseconds. *Floor* is the share reached of the least possible
time: the larger of FLOPs and bytes over what the same machine was measured to do at best. *Error*
is the largest against fp64. *× ours* is a peer's time over our fastest: above 1 we are faster.
"""
COLUMNS = ["case", "", "peer", "ms", "quartiles", "floor", "error", "peak MiB", "× ours"]


def performance_page(kinds: Kinds) -> str:
    parts = [PERFORMANCE]
    for files in kinds.values():
        parts.append(f"## {plots.title(files[0][1])}\n")
        for path, document in files:
            parts.append(f"{conditions(document)}.\n")
            found = by_suite(document)
            for suite in filter(found.__contains__, SUITES):
                parts.append(suite_section(suite, found[suite], document, path))
    return "\n".join(parts)


def suite_section(suite: str, found: list[dict], document: Document, path: Path) -> str:
    parts = [f"### {suite}\n"]
    picture = plots.picture_path(path, suite)
    if picture.exists():
        parts.append(f"![{suite}]({os.path.relpath(picture, ROOT / 'docs')})\n")
    if limit := limits.text(suite, document["machine"]["device"]):
        share = reached(found)
        parts.append(limit + (f" Ours reaches {share} of the floor here.\n" if share else "\n"))
    rows = [row for result in found for row in performance_rows(result)]
    parts.append(markdown(COLUMNS, rows, right=3) + "\n")
    slower = faster_peers(found)
    if slower:
        parts.append("Where others are faster:\n\n" + "\n".join(f"- {s}" for s in slower) + "\n")
    elif any(results.fastest(r, ours=False) for r in found):
        parts.append("No peer here is faster.\n")
    if known := facts(found, document):
        parts.append("\n".join(f"- {fact}" for fact in known) + "\n")
    if left_out := reasons(found):
        lines = "\n".join(f"- {line}" for line in left_out)
        parts.append(f"Left out, and of how many of {len(found)} cases:\n\n{lines}\n")
    return "\n".join(parts)


def performance_rows(result: dict) -> Iterator[list[str]]:
    mine, timed = results.fastest(result, ours=True), results.timed(result)
    head = [result["case"], short(result["dtype"])]
    for name in sorted(timed, key=lambda name: results.median(result, name)):
        bold = f"**{name}**" if timed[name].get("ours", False) else name
        yield [*head, bold, *cells_of(result, name, mine)]
        head = ["", ""]


def facts(found: list[dict], document: Document) -> list[str]:
    """What only some suites know: tokens a second and MFU, bytes of the wheel."""
    lines, sheet = [], document["machine"].get("data_sheet_flops")
    for result in found:
        for name, peer in results.timed(result).items():
            words = [f"{k.replace('_', ' ')} {v:,.0f}" for k, v in peer.get("facts", {}).items()]
            if result["tokens"]:
                seconds = results.median(result, name)
                flops = result["flops"] / seconds
                words.append(f"{result['tokens'] / seconds:,.0f} tokens/s")
                words.append(f"{flops / 1e12:.3g} TFLOP/s at {FORMULA}")
                if sheet:
                    words.append(f"MFU {flops / sheet:.1%} of the data sheet's {sheet / 1e12:.0f}")
                if share := peer.get("share_of_floor"):
                    words.append(f"MFU {share:.1%} of the measured ceiling")
            if words:
                lines.append(f"{result['case']}, {name}: {', '.join(words)}")
    return lines


# ---- HTML ----------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff }
h1, h2, h3 { line-height: 1.2 } h2 { margin-top: 3rem } svg { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: 13px }
td, th { padding: 2px 10px; text-align: right }
td:nth-child(-n+3), th:nth-child(-n+3) { text-align: left }
tr.first td { border-top: 1px solid #ddd }
tr.ours td { font-weight: 600 } p.where, li { color: #555; font-size: 13px }
"""


def page(kinds: Kinds) -> str:
    """Everything in one file that needs no other."""
    out = ["<!doctype html><html lang=en><meta charset=utf-8><title>fastattn benchmarks</title>"]
    out.append(f"<style>{STYLE}</style><h1>fastattn benchmarks</h1>")
    out.append(f"<p>{html.escape(' '.join(PERFORMANCE.split('method. ')[1].split()))}</p>")
    for files in kinds.values():
        out.append(f"<h2>{html.escape(plots.title(files[0][1]))}</h2>")
        for _, document in files:
            out.append(f"<p class=where>{html.escape(conditions(document))}.</p>")
            found = by_suite(document)
            for suite in filter(found.__contains__, SUITES):
                out.append(f"<h3>{suite}</h3>{plots.svg(suite, document, found[suite])}")
                out.append(html_table(found[suite]))
                lines = faster_peers(found[suite]) + facts(found[suite], document)
                lines += [f"left out: {line}" for line in reasons(found[suite])]
                out.append("<ul>" + "".join(f"<li>{html.escape(x)}" for x in lines) + "</ul>")
    return "\n".join(out)


def html_table(found: list[dict]) -> str:
    rows = ["<table><tr>" + "".join(f"<th>{c}" for c in COLUMNS)]
    for result in found:
        for cells in performance_rows(result):
            kinds = ("first " if cells[0] else "") + ("ours" if cells[2].startswith("**") else "")
            text = "".join(f"<td>{html.escape(c.strip('*'))}" for c in cells)
            rows.append(f'<tr class="{kinds}">{text}')
    return "\n".join([*rows, "</table>"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
