"""Runs cases: each peer is checked against fp64, then its memory is measured, then all are timed.

The results file is rewritten whole after each case. With a time budget, cases come in order of rank
and none begins that would not fit.
"""

from __future__ import annotations

import gc
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import machine, results, supervise
from .case import Call, Case, Inputs, Peer
from .ceilings import Ceilings, streaming
from .device import CallFailedError, Device
from .timing import MIN_ROUNDS, Timing, interleave, timing

RECENT = 5  # cases of a suite whose durations tell what its next may take
REMEASURE_SECONDS = 60.0  # between measurements of the ceilings
QUICK_ROUNDS = 3  # at least, of a quick run
SEED = 0  # of what is random, for the exact result and for each peer's first
SLOW = 4.0  # a call longer than this many times the seconds of a case is not repeated
LOSSES = 2  # of the process, by one peer in one suite: then it is left out of the rest

STREAMING = ""  # among the peers' calls: no peer, but the floor of a case bound by memory

NO_REASON = re.compile("not used because|runtime disabled")  # of SDPA's other kernels

Exact = dict[str, Tensor]
Taken = dict[str, Call]  # by the peer's name


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
    resume: bool = False  # go on with the file `out`
    supervised: bool = False  # somebody wants to know what is tried
    options: dict[str, Any] = field(default_factory=dict)  # as given: for the record


class Run:
    def __init__(self, plan: Plan, now: Callable[[], float] = time.monotonic) -> None:
        self.plan, self._now, self._begin = plan, now, now()
        self.ceilings = Ceilings(plan.device)
        self._measured, self._written = -float("inf"), now()
        self._took: dict[str, list[float]] = {}  # by suite: seconds of each case so far
        here = machine.describe(plan.device.torch_device)
        if plan.resume and plan.out.exists():
            self.document = results.read(plan.out)
            if (kind := self.document["machine"]["kind"]) != here["kind"]:
                raise ValueError(f"{plan.out} is of another machine: {kind}, not {here['kind']}")
            self.ceilings.resume(self.document["ceilings"])
            return
        self.document = {
            "version": results.VERSION,
            "complete": False,
            "seconds": 0.0,
            "options": plan.options,
            "machine": here,
            "ceilings": self.ceilings.document(),
            "clocks": [],
            "results": [],
        }

    def __call__(
        self,
        begin: Callable[[Case], None] = lambda case: None,
        done: Callable[[dict], None] = lambda result: None,
    ) -> bool:
        """Runs the cases; True if all of them were. `begin` gets each case, `done` its result."""
        have = {results.key(r) for r in self.document["results"]}
        missing = [case for case in self.plan.cases if key_of(case) not in have]
        earlier = {tuple(key) for key in self.document.get("missing", [])}  # of other filters
        self.tell_missing(earlier | {key_of(case) for case in missing})
        for case in sorted(missing, key=lambda case: case.rank):
            if not self.fits(case):
                continue  # a case of another suite may take less
            start = self._now()
            begin(case)
            self.measure_ceilings()
            self.write()
            self.document["results"].append(self.run(case))
            self.tell_missing({tuple(key) for key in self.document["missing"]} - {key_of(case)})
            self.write()
            self._took.setdefault(case.suite, []).append(self._now() - start)
            done(self.document["results"][-1])
        self.measure_ceilings(at_once=True)
        self.write()
        have = {results.key(r) for r in self.document["results"]}
        return have >= {key_of(case) for case in self.plan.cases}

    def tell_missing(self, keys: set[tuple[str, ...]]) -> None:
        self.document["missing"] = sorted(map(list, keys))
        self.document["complete"] = not keys

    def fits(self, case: Case) -> bool:
        """Time is left for a case as long as the longest of the last few of its suite.

        The first of a suite may take what a usual case has taken so far.
        """
        if self.plan.budget is None:
            return True
        so_far = [seconds for took in self._took.values() for seconds in took]
        known = self._took.get(case.suite, [])[-RECENT:]
        next_one = max(known) if known else statistics.median(so_far or [0.0])
        return self._now() - self._begin + next_one <= self.plan.budget

    def measure_ceilings(self, at_once: bool = False) -> None:
        if at_once or self._now() - self._measured > REMEASURE_SECONDS:
            self.ceilings.measure({case.dtype for case in self.plan.cases})
            self.document["clocks"].append(machine.clocks(self.plan.device.torch_device))
            self._measured = self._now()

    def write(self) -> None:
        """Floors are by the best ceilings of the run so far."""
        self.document["ceilings"] = self.ceilings.document()
        self.document["seconds"] += self._now() - self._written
        self._written = self._now()
        for result in self.document["results"]:
            floor, bound = self.ceilings.floor(result) or (None, None)
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
            "dtype": key_of(case)[2],
            "rank": case.rank,
            "baseline": case.baseline,
            "flops": case.flops,
            "moved_bytes": case.moved_bytes,
            "tokens": case.tokens,
            "floor_seconds": None,
            "bound": None,
            "peers": {},
        }
        peers = [peer for peer in self.plan.peers if case.suite in peer.suites]
        self.note(case)
        if (reason := self.lost(case, "")) is None:
            try:
                self.run_peers(case, peers, result)
            except supervise.DeviceLostError:
                raise
            except Exception as error:  # such as no memory for the exact result
                reason = reason_of(error)
        if reason is not None:
            result["peers"] = {p.name: {"refused": f"the case failed: {reason}"} for p in peers}
        self.tidy()
        return result

    def run_peers(self, case: Case, peers: list[Peer], result: dict) -> None:
        """Fills in what the result says of each peer, and of the memory in the same rounds."""
        if any(peer.compiles for peer in peers):
            torch.compiler.reset()  # or the cases before would count against the recompile limit
        on, taken, entries = self.plan.device.torch_device, Taken(), result["peers"]
        inputs = case.inputs(on)
        torch.manual_seed(SEED)
        exact = case.exact(inputs)
        for peer in peers:
            reason = self.left_out(peer, case) or peer.refuses(case, on)
            if reason is None:
                entries[peer.name] = self.try_out(peer, case, inputs, exact, taken)
            else:
                entries[peer.name] = {"refused": reason}
        self.note(case)
        for name, t in self.time_all(case, taken, entries).items():
            if name == STREAMING:
                result["streaming_seconds"] = t.best
            else:
                entries[name]["seconds"] = asdict(t)

    def time_all(self, case: Case, taken: Taken, entries: dict[str, dict]) -> dict[str, Timing]:
        """Of those that took the case, in turn; who fails now is refused."""
        rounds = QUICK_ROUNDS if self.plan.quick else MIN_ROUNDS
        seconds, cold = self.plan.seconds, case.cold
        on_cpu = self.plan.device.torch_device.type == "cpu"
        beside = {STREAMING: streaming(case)} if case.streaming and on_cpu else {}
        while taken:
            calls = taken | beside
            try:
                return interleave(self.plan.device, calls, seconds, cold=cold, min_rounds=rounds)
            except CallFailedError as error:  # where all are held there may be no memory for one
                if error.name == STREAMING:
                    beside.clear()
                else:
                    reason = f"{reason_of(error)}, when all took turns"
                    entries[error.name] = {"refused": reason}
                    del taken[error.name]
            self.tidy()
        return {}

    def note(self, case: Case, peer: Peer | None = None) -> None:
        if self.plan.supervised:
            name, compiles = ("", False) if peer is None else (peer.name, peer.compiles)
            supervise.note(self.plan.out, *key_of(case), name, compiles)

    def lost(self, case: Case, peer: str) -> str | None:
        """How an earlier attempt ended, if this took the process down."""
        for entry in self.document.get("lost", []):
            if (*results.key(entry), entry["peer"]) == (*key_of(case), peer):
                return entry["reason"]
        return None

    def left_out(self, peer: Peer, case: Case) -> str | None:
        if (reason := self.lost(case, peer.name)) is not None:
            return reason
        losses = [x for x in self.document.get("lost", []) if x["peer"] == peer.name]
        if sum(x["suite"] == case.suite for x in losses) >= LOSSES:
            return f"it took {LOSSES} cases of the suite down with it"
        telling = case.rank == 0 and not self.plan.quick
        if peer.compiles and not telling and peer.name not in self.plan.named:
            return "compiles: only in cases of rank 0 of a full run, or if named by --peer"
        return None

    def try_out(self, peer: Peer, case: Case, inputs: Inputs, exact: Exact, taken: Taken) -> dict:
        """What the results file says of the peer so far; its call is added to those taken."""
        self.note(case, peer)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                entry = self.attempt(peer, case, inputs, exact, taken)
            except Exception as error:  # whatever a peer raises, the others go on
                entry = {"refused": reason_of(error, [str(w.message) for w in told])}
        if "refused" in entry:  # only now: the exception held the tensors of its frames
            self.tidy()
        return entry

    def attempt(self, peer: Peer, case: Case, inputs: Inputs, exact: Exact, taken: Taken) -> dict:
        entry: dict[str, Any] = {"ours": True} if peer.ours else {}
        call = peer.prepare(case, inputs)
        if case.random and peer.backend is None:
            exact = {}  # its numbers are others
        torch.manual_seed(SEED)
        start = self._now()
        found = call.first()
        first = self._now() - start
        entry["errors"] = errors(case, found, exact)
        del found
        for name, error in entry["errors"].items():
            largest = float(exact[name].abs().max())
            if not error <= case.wrong_beyond * largest:
                wrong = f"wrong: the error of {name} is {error:.2g}, its largest {largest:.2g}"
                return {"refused": wrong}
        if call.facts:
            entry["facts"] = dict(call.facts)
        if case.once:
            return entry | {"seconds": asdict(timing([first], 1))}
        if not case.timed_only:
            if call.release is not None:
                call.release()
            entry["peak_bytes"] = self.plan.device.peak_bytes(lambda: only_run(call))
        start = self._now()
        self.plan.device.times({"": call}, case.cold)  # warm
        seconds = self._now() - start
        if seconds > SLOW * self.plan.seconds and not peer.ours and peer.name != case.baseline:
            limit = f"{SLOW * self.plan.seconds:g} s"
            return {"refused": f"a call takes over {limit}: too slow, but with more --seconds"}
        taken[peer.name] = call
        return entry

    def tidy(self) -> None:
        """Frees a GPU's memory for the next. Raises DeviceLostError where the GPU is gone."""
        if self.plan.device.torch_device.type == "cuda":
            gc.collect()
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                raise supervise.DeviceLostError(reason_of(error)) from error


def key_of(case: Case) -> tuple[str, str, str]:
    """As results.key of its result."""
    return case.suite, case.name, str(case.dtype).removeprefix("torch.")


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


def reason_of(error: Exception, told: Sequence[str] = ()) -> str:
    """The first telling line of an exception; SDPA tells why it has no kernel in warnings."""
    if isinstance(error, CallFailedError) and isinstance(error.__cause__, Exception):
        return reason_of(error.__cause__, told)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if text.startswith(("No available kernel", "No viable backend")):
        why = [t.partition(" (Triggered")[0] for t in told if not NO_REASON.search(t)]
        text = "; ".join(dict.fromkeys(why)) or text
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
