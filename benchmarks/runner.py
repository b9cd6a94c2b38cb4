"""Runs cases: each peer is checked against fp64, then its memory is measured, then all are timed.

The results file is rewritten whole after each case. With a time budget, cases come in order of rank
and none begins that would not fit; peers that compile join only the cases of rank 0 then.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import machine, results
from .case import Call, Case, Inputs, Peer
from .ceilings import Ceilings
from .device import Device
from .timing import interleave, timing

REMEASURE_SECONDS = 60.0  # between measurements of the ceilings
SLOW = 4.0  # a call longer than this many times the seconds of a case is not repeated

Show = Callable[[dict], None]


@dataclass
class Plan:
    """What a run does."""

    device: Device
    cases: Sequence[Case]
    peers: Sequence[Peer]
    seconds: float  # of timing, a case
    out: Path
    quick: bool = False
    budget: float | None = None  # seconds of the whole run
    named: frozenset[str] = frozenset()  # peers asked for by name, which may compile in any run
    options: dict[str, Any] = field(default_factory=dict)  # as given: for the record


class Run:
    def __init__(self, plan: Plan, now: Callable[[], float] = time.monotonic) -> None:
        self.plan, self._now, self._begin = plan, now, now()
        self.ceilings = Ceilings(plan.device)
        self._measured = -float("inf")
        self._longest = 0.0  # of the cases so far, in seconds
        self._cases: list[Case] = []  # those done
        on = plan.device.torch_device
        self.document: results.Document = {
            "version": results.VERSION,
            "complete": False,
            "seconds": 0.0,
            "options": plan.options,
            "machine": machine.describe(on),
            "ceilings": {},
            "clocks": [],
            "results": [],
        }

    def __call__(self, begin: Show = lambda case: None, done: Show = lambda result: None) -> bool:
        """Runs the cases; True if all of them were. `begin` gets each case, `done` its result."""
        complete = True
        for case in sorted(self.plan.cases, key=lambda case: case.rank):
            if not self.fits():
                complete = False
                break
            start = self._now()
            begin(case)  # type: ignore[arg-type]
            self.measure_ceilings()
            self.document["results"].append(self.run(case))
            self._cases.append(case)
            self._longest = max(self._longest, self._now() - start)
            self.write()
            done(self.document["results"][-1])
        self.measure_ceilings(at_once=True)
        self.document["complete"] = complete
        self.write()
        return complete

    def fits(self) -> bool:
        """Time is left for another case as long as the longest so far."""
        used = self._now() - self._begin
        return self.plan.budget is None or used + self._longest <= self.plan.budget

    def measure_ceilings(self, at_once: bool = False) -> None:
        if at_once or self._now() - self._measured > REMEASURE_SECONDS:
            self.ceilings.measure({case.dtype for case in self.plan.cases})
            self.document["clocks"].append(machine.clocks(self.plan.device.torch_device))
            self._measured = self._now()

    def write(self) -> None:
        """Floors are by the best ceilings of the run so far."""
        self.document["ceilings"] = self.ceilings.document()
        self.document["seconds"] = self._now() - self._begin
        for case, result in zip(self._cases, self.document["results"], strict=True):
            floor, bound = self.ceilings.floor(case) or (None, None)
            result["floor_seconds"], result["bound"] = floor, bound
            for name, peer in results.timed(result).items():
                share = None if floor is None else floor / results.median(result, name)
                peer["share_of_floor"] = share
        results.write(self.plan.out, self.document)

    # ---- one case ------------------------------------------------------------------------------

    def run(self, case: Case) -> dict:
        result: dict[str, Any] = {
            "suite": case.suite,
            "case": case.name,
            "dtype": str(case.dtype).removeprefix("torch."),
            "rank": case.rank,
            "baseline": case.baseline,
            "flops": case.flops,
            "moved_bytes": case.moved_bytes,
            "tokens": case.tokens,
            "floor_seconds": None,
            "bound": None,
            "peers": {},
        }
        if any(peer.compiles for peer in self.plan.peers):
            torch.compiler.reset()  # or the cases before would count against the recompile limit
        inputs = case.inputs(self.plan.device.torch_device)
        exact = case.exact(inputs)
        calls: dict[str, Call] = {}
        for peer in self.plan.peers:
            if case.suite not in peer.suites:
                continue
            entry = result["peers"][peer.name] = {"ours": True} if peer.ours else {}
            reason = self.left_out(peer, case) or peer.refuses(case, self.plan.device.torch_device)
            if reason is None:
                reason = self.try_out(peer, case, inputs, exact, entry, calls)
            if reason is not None:
                result["peers"][peer.name] = {"refused": reason}
        if calls:
            timings = interleave(self.plan.device, calls, self.plan.seconds, case.cold)
            for name, t in timings.items():
                result["peers"][name]["seconds"] = asdict(t)
        calls.clear()
        self.tidy()
        return result

    def left_out(self, peer: Peer, case: Case) -> str | None:
        if peer.compiles and peer.name not in self.plan.named:
            if self.plan.quick:
                return "compiles: in a quick run only if named by --peer"
            if self.plan.budget is not None and case.rank > 0:
                return "compiles: under a time budget only in cases of rank 0"
        return None

    def try_out(
        self,
        peer: Peer,
        case: Case,
        inputs: Inputs,
        exact: dict[str, Tensor],
        entry: dict[str, Any],
        calls: dict[str, Call],
    ) -> str | None:
        """Checks the peer and notes its call; or tells why it can't take the case."""
        try:
            call = peer.prepare(case, inputs)
            start = self._now()
            found = call.first()
            first = self._now() - start
            entry["errors"] = errors(case, found, exact)
            del found
            for name, error in entry["errors"].items():
                largest = float(exact[name].abs().max())
                if not error <= case.wrong_beyond * largest:
                    return f"wrong: the error of {name} is {error:.2g}, its largest {largest:.2g}"
            if case.once:
                entry["seconds"] = asdict(timing([first], 1))
                entry["facts"] = dict(call.facts)
                return None
            if exact:
                entry["peak_bytes"] = self.plan.device.peak_bytes(lambda: only_run(call))
            start = self._now()
            self.plan.device.times({"": call}, case.cold)  # warm
            seconds, limit = self._now() - start, SLOW * self.plan.seconds
        except Exception as error:  # whatever a peer raises, the others go on
            self.tidy()
            return reason_of(error)
        if seconds > limit and not peer.ours and peer.name != case.baseline:
            return f"too slow for this run: {seconds:.2g} s a call; --seconds gives more"
        calls[peer.name] = call
        return None

    def tidy(self) -> None:
        gc.collect()
        if self.plan.device.torch_device.type == "cuda":
            torch.cuda.empty_cache()


def only_run(call: Call) -> None:
    """With `before`, since what it leaves for `run` is part of what the work holds."""
    if call.before is not None:
        call.before()
    call.run()


def errors(case: Case, found: Any, exact: dict[str, Tensor]) -> dict[str, float]:
    """The largest absolute error of each result's checked part; NaN is infinitely wrong."""
    worst = {}
    for name, expected in exact.items():
        difference = (case.parts(name, found[name].detach()).double() - expected).abs()
        worst[name] = float(difference.nan_to_num(nan=torch.inf).max())
    return worst


def reason_of(error: Exception) -> str:
    """The first telling line of an exception."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 160 else text[:159] + "…"


def matching(cases: Iterable[Case], *, suites=(), shape="", dtypes=()) -> list[Case]:
    """Those that the filters leave; `shape` is words that must all be in the name."""
    return [
        case
        for case in cases
        if (not suites or case.suite in suites)
        and (not dtypes or str(case.dtype).removeprefix("torch.") in dtypes)
        and all(word.lower() in case.name.lower().split() for word in shape.split())
    ]
