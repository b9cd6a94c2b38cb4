"""Turns results files into pages: one self-contained HTML page, and the tables in the documents.

`report DIR… --html page.html` takes any files. `report` alone writes the committed results into
README.md, between its markers, and docs/performance.md; `--check` fails if they are not up to date.
No number in them comes from a hand.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fastattn.files import replacing

from . import plots, results
from .digest import conditions, faster_peers, readme_row, titles
from .pages import bullets, markdown, page, performance_page
from .results import Document, Kinds
from .suites import SUITES

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
README_HEADER = ["", "case", "", "ms", "peer's", "**×**", "floor", "error", "peer's"]
README_HEADER += ["MiB", "peer's"]


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
    if not args.check:
        draw_missing(documents)
    wanted = {
        readme: in_readme(readme.read_text(), kinds),
        performance: performance_page(kinds, ROOT),
    }
    stale = [p for p, text in wanted.items() if not p.exists() or p.read_text() != text]
    if args.check and stale:
        names = ", ".join(str(p.relative_to(ROOT)) for p in stale)
        print(f"{names}: not what benchmarks/results says; run `fastattn bench report`")
        return 1
    for path in stale:
        save(path, wanted[path])
        print(f"wrote {path}")
    return 0


def draw_missing(documents: list[tuple[Path, Document]]) -> None:
    """Pictures of runs that drew none, as those on a borrowed GPU."""
    for path, document in documents:
        if not any(plots.picture_path(path, s).exists() for s in plots.by_suite(document)):
            for picture in plots.draw(document, path):
                print(f"wrote {picture}")


def save(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())


# ---- README.md -----------------------------------------------------------------------------------


def in_readme(text: str, kinds: Kinds) -> str:
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{readme_tables(kinds)}\n{END}{after}"


def readme_tables(kinds: Kinds) -> str:
    """A table of the most telling cases (rank 0) a kind of machine: the newest, others folded."""
    parts = []
    for kind, files in kinds.items():
        shown, used = [], []
        for _, document in files:
            telling = [r for r in document["results"] if r["rank"] == 0 and results.ratio(r)]
            used += [document] if telling else []
            older = f" ({document['machine']['date'][:10]})" if used[1:] else ""
            shown += [(r, readme_row(r, older)) for r in telling]
        if not shown:
            continue
        shown.sort(key=lambda pair: SUITES.index(pair[0]["suite"]))
        table = markdown(README_HEADER, 3, [row for _, row in shown])
        if lines := faster_peers([r for r, _ in shown]):
            table += f"\n\nOthers are faster here:\n\n{bullets(lines)}"
        table += "".join(f"\n\n*{conditions(d)}.*" for d in used)
        if parts:
            table = f"<details>\n<summary>{titles(kinds)[kind]}</summary>\n\n{table}\n\n</details>"
        else:
            table += readme_picture(files)
        parts.append(table)
    return "\n\n".join(parts)


def readme_picture(files: list[tuple[Path, Document]]) -> str:
    """The newest of the first suite that was drawn."""
    drawn = (plots.picture_path(path, SUITES[0]) for path, _ in files)
    found = next((path for path in drawn if path.exists()), None)
    return f"\n\n![{SUITES[0]}]({os.path.relpath(found, ROOT)})" if found else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
