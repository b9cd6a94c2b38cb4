"""The two pages of all results: docs/performance.md, and one HTML file that needs no other.

Both begin with a summary, and have for each machine and suite a picture, what limits the kernels,
a line a case; then, folded, every peer, and who was left out and why.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from . import digest, limits, plots
from .digest import Table
from .results import Document, Kinds
from .show import reasons
from .suites import SUITES

LEGEND = """Times are medians in milliseconds. *Floor* is the share reached of the least possible
time: the larger of FLOPs and bytes over what the same machine was measured to do at best. *Error*
is the largest against fp64. **×** is the time of a peer over ours: above 1 we are faster."""


@dataclass
class Part:
    """A suite on a machine in one run."""

    document: Document
    path: Path
    results: list[dict]
    cases: Table = field(init=False)
    every_peer: Table = field(init=False)

    def __post_init__(self) -> None:
        self.cases = *digest.CASE_COLUMNS, [digest.case_row(r) for r in self.results]
        every = [row for result in self.results for row in digest.peer_rows(result)]
        self.every_peer = *digest.PEER_COLUMNS, every

    @property
    def run(self) -> str:
        m = self.document["machine"]
        return f"{m['date'][:10]}, commit {m['commit']}"


@dataclass
class Section:
    """A suite on a machine; `parts` are its runs, newest first."""

    kind: str
    suite: str
    device: str
    parts: list[Part]

    @property
    def anchor(self) -> str:
        return f"{self.kind}-{self.suite}"

    @property
    def results(self) -> list[dict]:
        return [result for part in self.parts for result in part.results]

    @property
    def limit(self) -> str:
        text, share = limits.text(self.suite, self.device), digest.reached(self.results)
        return f"{text} Ours reaches {share} of the floor here." if text and share else text

    @property
    def faster(self) -> list[str]:
        return digest.faster_peers(self.results)


def sections(kind: str, files: list[tuple[Path, Document]]) -> list[Section]:
    found: dict[str, Section] = {}
    for path, document in files:
        for suite, some in plots.by_suite(document).items():
            device = document["machine"]["device"]
            section = found.setdefault(suite, Section(kind, suite, device, []))
            section.parts.append(Part(document, path, some))
    return [found[suite] for suite in SUITES if suite in found]


def markdown(header: list[str], right: int, rows: list[list[str]]) -> str:
    """A table whose columns from `right` on are aligned right."""
    rule = ["---" if i < right else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


# ---- docs/performance.md -------------------------------------------------------------------------


def performance_page(kinds: Kinds, root: Path) -> str:
    """Pictures are named relative to docs/ of `root`."""
    whole = {kind: sections(kind, files) for kind, files in kinds.items()}
    titles = digest.titles(kinds)
    out = [
        "# Performance\n",
        "Made by `fastattn bench report` from benchmarks/results;"
        " [benchmarks/](../benchmarks/README.md) has the method.\n" + LEGEND + "\n",
        "## In short\n",
    ]
    for kind in kinds:
        rows = []
        for section in whole[kind]:
            link = f"[{section.suite}](#{section.anchor})"
            rows.append(digest.suite_row(link, section.results))
        out.append(f"**{titles[kind]}**\n\n{markdown(*digest.SUITE_COLUMNS, rows)}\n")
        if lines := [f"{s.suite}, {line}" for s in whole[kind] for line in s.faster]:
            out.append(f"Where others are faster:\n\n{bullets(lines)}\n")
        else:
            out.append("No peer that was measured here is faster anywhere.\n")
    for kind, files in kinds.items():
        out.append(f"## {titles[kind]}\n")
        out.append(bullets(f"{digest.conditions(document)}." for _, document in files) + "\n")
        out += [markdown_section(section, root) for section in whole[kind]]
    return "\n".join(out)


def markdown_section(section: Section, root: Path) -> str:
    out = [f'<a id="{section.anchor}"></a>\n\n### {section.suite}\n']
    if section.limit:
        out.append(f"{section.limit}\n")
    for part in section.parts:
        if len(section.parts) > 1:
            out.append(f"*{part.run}*\n")
        picture = plots.picture_path(part.path, section.suite)
        if picture.exists():
            out.append(f"![{section.suite}]({os.path.relpath(picture, root / 'docs')})\n")
        out.append(markdown(*part.cases) + "\n")
        if training := digest.training(part.results, part.document):
            out.append(f"{markdown(*training)}\n\n{digest.TRAINING_WORDS}\n")
        if known := digest.facts(part.results):
            out.append(bullets(known) + "\n")
        out.append(folded("Every peer, with quartiles", markdown(*part.every_peer)))
        if left_out := reasons(part.results):
            title = f"Left out, and of how many of {len(part.results)} cases"
            out.append(folded(title, bullets(left_out)))
    return "\n".join(out)


def folded(title: str, text: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>\n"


# ---- HTML ----------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff }
h1, h2, h3 { line-height: 1.2 } h2 { margin-top: 3rem } h3 { margin-top: 2.5rem }
svg { max-width: 100%; height: auto } a { color: #1f5fa8 } p, ul { max-width: 60rem }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0 }
td, th { padding: 3px 10px; text-align: right; font-variant-numeric: tabular-nums }
td.text, th.text { text-align: left } th { border-bottom: 1px solid #999; vertical-align: bottom }
tr.first td { border-top: 1px solid #ddd }
p.where, li.where, details { color: #555; font-size: 13px } summary { cursor: pointer }
"""


def page(kinds: Kinds) -> str:
    out = ["<!doctype html><html lang=en><meta charset=utf-8>"]
    out.append(
        '<meta name=viewport content="width=device-width"><title>fastattn benchmarks</title>'
    )
    out.append(f"<style>{STYLE}</style><h1>fastattn benchmarks</h1><p>{inline(LEGEND)}</p>")
    whole = {kind: sections(kind, files) for kind, files in kinds.items()}
    titles = digest.titles(kinds)
    for kind, files in kinds.items():
        rows = [digest.suite_row(f"[{s.suite}](#{s.anchor})", s.results) for s in whole[kind]]
        out.append(f"<h2>{html.escape(titles[kind])}</h2>")
        where = (f"{digest.conditions(document)}." for _, document in files)
        out.append(html_list(where, "where") + html_table(*digest.SUITE_COLUMNS, rows))
        if lines := [f"{s.suite}, {line}" for s in whole[kind] for line in s.faster]:
            out.append("<p>Where others are faster:</p>" + html_list(lines))
        out += [html_section(section) for section in whole[kind]]
    return "\n".join(out)


def html_section(section: Section) -> str:
    out = [f'<h3 id="{section.anchor}">{section.suite}</h3><p>{inline(section.limit)}</p>']
    for part in section.parts:
        if len(section.parts) > 1:
            out.append(f"<p class=where>{html.escape(part.run)}</p>")
        out.append(plots.svg(section.suite, part.document, part.results))
        out.append(html_table(*part.cases))
        if training := digest.training(part.results, part.document):
            out.append(html_table(*training) + f"<p class=where>{digest.TRAINING_WORDS}</p>")
        out.append(html_list(digest.facts(part.results)))
        every = html_table(*part.every_peer)
        out.append(f"<details><summary>Every peer, with quartiles</summary>{every}</details>")
        if left_out := reasons(part.results):
            title = f"Left out, and of how many of {len(part.results)} cases"
            out.append(f"<details><summary>{title}</summary>{html_list(left_out)}</details>")
    return "\n".join(out)


def html_list(lines: Iterable[str], kind: str = "") -> str:
    items = "".join(f'<li class="{kind}">{html.escape(line)}' for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def html_table(header: list[str], right: int, rows: list[list[str]]) -> str:
    def cells(tag: str, row: list[str]) -> str:
        kinds = ["" if i >= right else " class=text" for i in range(len(row))]
        return "".join(f"<{tag}{k}>{inline(c)}" for k, c in zip(kinds, row, strict=True))

    lines = [f"<tr>{cells('th', header)}"]
    lines += [f'<tr class="{"first" if row[0] else ""}">{cells("td", row)}' for row in rows]
    return "\n".join(["<table>", *lines, "</table>"])


def inline(text: str) -> str:
    """Markdown's bold, italic and links, as the digest has them."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))
    text = re.sub(r"\*(.+?)\*", r"<i>\1</i>", text)
    return re.sub(r"\[(.+?)\]\((.+?)\)", r'<a href="\2">\1</a>', text)
