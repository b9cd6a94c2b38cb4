"""What results say, in words and in rows of cells: README.md and both pages are made of these."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from . import plots, results
from .case import short
from .results import Document, Kinds, is_held
from .show import cells_of, milliseconds
from .train_step import FORMULA

SLOWER = 1.03  # a peer that is faster by less is as fast

# Headers of tables, and from which column on they hold numbers.
PEER_COLUMNS = ["case", "", "peer", "ms", "quartiles", "floor", "error", "peak MiB", "× ours"], 3
CASE_COLUMNS = (
    ["case", "", "ms", "floor", "error", "peak MiB", "**×**", "over", "**×**", "best other"],
    2,
)
SUITE_COLUMNS = ["suite", "cases", "**×**", "over", "floor", "faster elsewhere"], 1
TRAINING_COLUMNS = ["case", "peer", "tokens/s", "MiB beyond gradients", "TFLOP/s", "MFU"], 2

Table = tuple[list[str], int, list[list[str]]]  # header, first column of numbers, rows


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
    left = len(document.get("missing", [])) or "some"
    cut = "" if document["complete"] else f"; {left} cases left out for time"
    return (
        f"{where}, torch {m['torch']}, {m['date'][:10]}, commit {m['commit']}{cut}. Medians of"
        f" interleaved calls; ceilings measured in the same run: {ceilings(document)}"
    )


def titles(kinds: Kinds) -> dict[str, str]:
    """What each kind of machine is, whether it was held back, and whether its kernels are older."""
    newest = max((files[0][1]["machine"] for files in kinds.values()), key=lambda m: m["date"])
    found = {}
    for kind, ((_, document), *_) in kinds.items():
        m, found[kind] = document["machine"], plots.title(document)
        if is_held(document):
            found[kind] += ", torch and fastattn held to it"
        if m["commit"] != newest["commit"]:
            found[kind] += f": older kernels, of {m['date'][:10]}"
    return found


def faster_peers(found: list[dict]) -> list[str]:
    """Where we are not the fastest, said plainly."""
    lines = []
    for result in (r for r in found if r["floor_seconds"]):  # an import of ours has torch's in it
        mine, theirs = results.fastest(result, ours=True), results.fastest(result, ours=False)
        name = f"{result['case']} {short(result['dtype'])}"
        if mine is None and theirs is not None:
            lines.append(f"{name}: {theirs} takes it, ours does not")
        elif theirs is not None and (gain := results.ratio(result, theirs)) and gain < 1 / SLOWER:
            lines.append(f"{name}: {theirs} is {1 / gain:.2f}× faster")
    return lines


def reached(found: list[dict]) -> str:
    """ "56–91 %" of the floor, ours."""
    shares = [
        100 * r["peers"][mine]["share_of_floor"]
        for r in found
        if (mine := results.fastest(r, ours=True)) and r["floor_seconds"]
    ]
    return f"{span(shares, '.0f')} %" if shares else ""


def span(numbers: list[float], digits: str) -> str:
    """ "2.24–5.09", or one number where all read alike."""
    low, high = (format(x, digits) for x in (min(numbers), max(numbers)))
    return low if low == high else f"{low}–{high}"


# ---- rows ----------------------------------------------------------------------------------------


def suite_row(suite: str, found: list[dict]) -> list[str]:
    """A suite in a line: how much faster we are than the baseline, typically and at the ends."""
    ratios = [x for r in found if r["floor_seconds"] and (x := results.ratio(r)) is not None]
    times = ""
    if ratios:
        times = f"**{statistics.median(ratios):.2f}**"
        times += f" ({span(ratios, '.2f')})" if len(ratios) > 1 else ""
    slower = len(faster_peers(found))
    baseline = found[0]["baseline"] if times else ""
    return [suite, str(len(found)), times, baseline, reached(found), str(slower or "")]


def case_row(result: dict) -> list[str]:
    """A case in a line: ours, over the baseline, and over the fastest of the others."""
    mine, best = results.fastest(result, ours=True), results.fastest(result, ours=False)
    ours = [""] * 4
    if mine is not None:
        ms, _, floor, error, peak, _ = cells_of(result, mine, mine)
        ours = [ms, floor, error, peak]
    head = [result["case"], short(result["dtype"]), *ours, *over(result, result["baseline"])]
    return [*head, *over(result, None if best == result["baseline"] else best)]


def over(result: dict, peer: str | None) -> list[str]:
    """How many times faster ours is, and than whom."""
    ratio = None if peer is None else results.ratio(result, peer)
    return ["", ""] if peer is None or ratio is None else [f"**{ratio:.2f}**", peer]


def peer_rows(result: dict) -> Iterator[list[str]]:
    """A line a peer, the fastest first."""
    mine, timed = results.fastest(result, ours=True), results.timed(result)
    head = [result["case"], short(result["dtype"])]
    for name in sorted(timed, key=lambda name: results.median(result, name)):
        bold = f"**{name}**" if timed[name].get("ours", False) else name
        yield [*head, bold, *cells_of(result, name, mine)]
        head = ["", ""]


def training(found: list[dict], document: Document) -> Table | None:
    """Tokens a second and MFU of training steps."""
    sheet, rows = document["machine"].get("data_sheet_flops"), []
    for result in (r for r in found if r["tokens"]):
        head = result["case"]
        for name in sorted(results.timed(result), key=lambda name: results.median(result, name)):
            seconds, peer = results.median(result, name), result["peers"][name]
            flops = result["flops"] / seconds
            cells = [head, f"**{name}**" if peer.get("ours", False) else name]
            cells += [f"{result['tokens'] / seconds:,.0f}", beyond_gradients(peer)]
            cells.append(f"{flops / 1e12:.3g}")
            share = peer.get("share_of_floor")
            cells.append("" if share is None else f"{share:.1%}")
            rows.append([*cells, f"{flops / sheet:.1%}"] if sheet else cells)
            head = ""
    header, right = TRAINING_COLUMNS
    if sheet:
        header = [*header, f"of the data sheet's {sheet / 1e12:.0f}"]
    return (header, right, rows) if rows else None


def beyond_gradients(peer: dict) -> str:
    """The peak without weights, AdamW's state and gradients, in MiB."""
    peak, gradients = peer.get("peak_bytes"), peer.get("facts", {}).get("gradient_bytes")
    return "" if peak is None or gradients is None else f"{(peak - gradients) / 2**20:.0f}"


TRAINING_WORDS = f"TFLOP/s count {FORMULA}; MFU is their share of the measured ceiling."


def facts(found: list[dict]) -> list[str]:
    """What a peer told besides its time: bytes of the wheel."""
    lines = []
    for result in (r for r in found if not r["tokens"]):
        for name, peer in results.timed(result).items():
            words = [f"{k.replace('_', ' ')} {v:,.0f}" for k, v in peer.get("facts", {}).items()]
            if words:
                lines.append(f"{result['case']}, {name}: {', '.join(words)}")
    return lines


def readme_row(result: dict, older: str = "") -> list[str]:
    """Ours beside the baseline; `older` says when it was, if before the others."""
    mine, baseline = results.fastest(result, ours=True), result["baseline"]
    assert mine is not None
    peer = result["peers"][mine]
    both = peer, result["peers"][baseline]
    errors, peaks = ([results.error(p) for p in both], [p.get("peak_bytes") for p in both])
    return [
        result["suite"],
        result["case"] + older,
        short(result["dtype"]),
        milliseconds(results.median(result, mine)),
        milliseconds(results.median(result, baseline)),
        f"**{results.ratio(result):.2f}**",
        f"{peer['share_of_floor']:.0%}" if peer.get("share_of_floor") else "",
        *("" if e is None else f"{e:.1e}" for e in errors),
        *("" if b is None else f"{b / 2**20:.0f}" for b in peaks),
    ]
