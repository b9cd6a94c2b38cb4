"""Pictures of results: how near each peer comes to the floor, a row a case, a colour a peer.

Beside ours stands how many times faster it is than the case's baseline.
"""

from __future__ import annotations

import io
from pathlib import Path

from . import results
from .case import short

OURS = ("#d62728", "#ff7f0e", "#e377c2", "#8c564b")
BASELINE, EAGER = "#1f77b4", "#9a9a9a"  # alike in every picture
THEIRS = ("#2ca02c", "#9467bd", "#17becf", "#bcbd22", "#98df8a", "#c5b0d5", "#c49c94", "#9edae5")


def figure(suite: str, found: list[dict], title: str):
    """Shares of the floor reached; None where nothing has a floor."""
    from matplotlib.figure import Figure

    rows = [r for r in found if r["floor_seconds"] and results.timed(r)]
    if not rows:
        return None
    names = list(dict.fromkeys(name for r in rows for name in results.timed(r)))
    ours = {name for r in rows for name, p in results.timed(r).items() if p.get("ours", False)}
    names.sort(key=lambda name: name not in ours)
    baseline = rows[0]["baseline"]
    mine = [n for n in names if n in ours]
    others = [n for n in names if n not in ours and n not in (baseline, "eager")]
    colours = {baseline: BASELINE, "eager": EAGER}
    colours |= {n: OURS[i % len(OURS)] for i, n in enumerate(mine)}
    colours |= {n: THEIRS[i % len(THEIRS)] for i, n in enumerate(others)}

    picture = Figure(figsize=(9, 1.3 + 0.24 * len(rows)), layout="constrained")
    axes = picture.subplots()
    for i, r in enumerate(rows):
        if (ratio := results.ratio(r)) is not None:
            best = r["peers"][results.fastest(r, ours=True)]["share_of_floor"]
            theirs = r["peers"][r["baseline"]]["share_of_floor"]
            axes.plot((100 * theirs, 100 * best), (i, i), color="#e8b4b4", linewidth=2, zorder=1)
            where = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
            where["bbox"] = {"color": "white", "pad": 0.5}
            axes.annotate(f"{ratio:.1f}×", (100 * max(best, theirs), i), fontsize=7.5, **where)
    for name in reversed(names):  # ours on top
        y = [i for i, r in enumerate(rows) if name in results.timed(r)]
        x = [100 * rows[i]["peers"][name]["share_of_floor"] for i in y]
        style = {"marker": "D", "s": 36, "zorder": 3} if name in ours else {"marker": "o", "s": 22}
        axes.scatter(x, y, color=colours[name], label=name, **style)
    axes.set_yticks(range(len(rows)), [f"{r['case']}  {short(r['dtype'])}" for r in rows])
    axes.tick_params(labelsize=8, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, max(108, 1.08 * axes.get_xlim()[1]))
    axes.axvline(100, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    axes.grid(axis="y", alpha=0.12)
    axes.set_xlabel(
        f"% of the floor reached: the least possible time over the time taken;  n×: {baseline}'s"
        " time over ours",
        fontsize=8,
    )
    axes.set_title(f"{suite}: {title}", fontsize=9, loc="left")
    handles, labels = axes.get_legend_handles_labels()
    picture.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=4, fontsize=7)
    return picture


def by_suite(document: dict) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for result in document["results"]:
        found.setdefault(result["suite"], []).append(result)
    return found


def picture_path(out: Path, suite: str) -> Path:
    """Beside the JSON file: 2026-11-24-9641fe9-decode.png"""
    return out.with_name(f"{out.stem}-{suite}.png")


def draw(document: dict, out: Path) -> list[Path]:
    """A PNG a suite; none without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return []
    drawn = []
    for suite, found in by_suite(document).items():
        picture = figure(suite, found, title(document))
        if picture is not None:
            picture.savefig(picture_path(out, suite), dpi=110)
            drawn.append(picture_path(out, suite))
    return drawn


def svg(suite: str, document: dict, found: list[dict]) -> str:
    """The same to stand in a page; empty where there is nothing to show."""
    picture = figure(suite, found, title(document))
    if picture is None:
        return ""
    text = io.StringIO()
    unstamped = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    picture.savefig(text, format="svg", metadata=unstamped)
    return text.getvalue()[text.getvalue().index("<svg") :]


def title(document: dict) -> str:
    m = document["machine"]
    return m.get("gpu") or f"{m['cpu']}, {m['threads']} threads, {m['isa']}"
