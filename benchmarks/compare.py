"""Two runs against each other, and this checkout against the committed results.

`compare A B` lists the times whose quartile ranges do not overlap. `check` (`make bench-check`)
runs quick cases of the CPU and compares ratios, never times: a peer's time over ours, from calls
that took turns, changes little from day to day where times do. What fell is measured once more.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from . import machine, results
from .case import short
from .ceilings import pin_threads
from .device import Cpu
from .results import Document
from .runner import Plan, Run, key_of
from .suites import cases, peers

TOLERANCE = 0.25  # a ratio this much lower than the committed one fails
CHECKED = ("attention-fwd", "attention-bwd", "decode", "cross-entropy", "linear-cross-entropy")


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(prog="fastattn bench compare", description=__doc__)
    p.add_argument("before", type=Path, help="a results file")
    p.add_argument("after", type=Path, help="another")
    args = p.parse_args(argv)
    before, after = results.read(args.before), results.read(args.after)
    if before["machine"]["kind"] != after["machine"]["kind"]:
        print(f"other machines: {before['machine']['kind']} and {after['machine']['kind']}")
    common, lines = changes(before, after)
    print("\n".join(lines))
    print(f"{len(lines)} of {common} times changed beyond the noise")
    return 0


def changes(before: Document, after: Document) -> tuple[int, list[str]]:
    """How many times both have, and a line for each that changed, the largest change first."""
    common, found = 0, []
    for old, new in both(before, after):
        for name in results.timed(old).keys() & results.timed(new).keys():
            common += 1
            a, b = (r["peers"][name]["seconds"] for r in (old, new))
            if b["lower"] > a["upper"] or b["upper"] < a["lower"]:
                times = b["median"] / a["median"]
                where = f"{old['suite']:<20} {old['case']:<44} {short(old['dtype']):<5} {name:<24}"
                ms = f"{1e3 * a['median']:9.3f} → {1e3 * b['median']:9.3f} ms"
                word = f"{1 / times:.2f}× faster" if times < 1 else f"{times:.2f}× slower"
                found.append((max(times, 1 / times), f"{where} {ms}  {word}"))
    return common, [line for _, line in sorted(found, reverse=True)]


def both(before: Document, after: Document) -> Iterator[tuple[dict, dict]]:
    old = {results.key(r): r for r in before["results"]}
    for new in after["results"]:
        if results.key(new) in old:
            yield old[results.key(new)], new


# ---- check ---------------------------------------------------------------------------------------


def check_main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(prog="fastattn bench check", description=__doc__)
    p.add_argument("--tolerance", type=float, default=TOLERANCE, help="default %(default)s")
    p.add_argument("--against", type=Path, default=results.RESULTS, help="the committed results")
    args = p.parse_args(argv)
    pin_threads(None)
    device = Cpu()
    kind = machine.describe(device.torch_device)["kind"]
    committed = results.by_kind(results.read_all([args.against])).get(kind, [])
    known = {results.key(r): r for _, document in committed for r in document["results"]}
    if not known:
        print(f"bench-check: no committed results for a {kind}; nothing to compare with")
        return 0
    asked_for = [case for case in cases("cpu") if case.quick and case.suite in CHECKED]
    chosen = [case for case in asked_for if key_of(case) in known]
    asked = [peer for peer in peers() if peer.ours or peer.name in {c.baseline for c in chosen}]
    with tempfile.TemporaryDirectory() as folder:
        for seconds in (0.5, 2.0):  # again, and longer, what fell: a noisy neighbour may have been
            run = Run(Plan(device, chosen, asked, seconds, out=Path(folder) / f"{seconds}.json"))
            run()
            lines, failed = verdicts(known, run.document, args.tolerance)
            print("\n".join(lines))
            chosen = [case for case in chosen if key_of(case) in failed]
            if not chosen:
                break
    if unknown := [case for case in asked_for if key_of(case) not in known]:
        print(f"bench-check: of {len(unknown)} cases there is no committed ratio for a {kind}")
    print(f"bench-check: {len(failed)} ratios fell by more than {args.tolerance:.0%}")
    return 1 if failed else 0


def verdicts(
    known: dict[tuple[str, str, str], dict], now: Document, tolerance: float
) -> tuple[list[str], set[tuple[str, str, str]]]:
    """A line a case that both have, and those that fell by more than the tolerance."""
    lines, failed = [], set()
    for result in now["results"]:
        old = known.get(results.key(result))
        before, after = (None if r is None else results.ratio(r) for r in (old, result))
        if before is None or after is None:
            continue
        fell = after < (1 - tolerance) * before
        failed |= {results.key(result)} if fell else set()
        where = f"{result['suite']:<20} {result['case']:<32} {short(result['dtype']):<5}"
        peer = f"{result['baseline']} / ours"
        lines.append(f"{where} {peer}: {before:.2f} → {after:.2f}{'  FELL' if fell else ''}")
    return lines, failed
