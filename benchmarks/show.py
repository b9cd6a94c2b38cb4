"""What a run shows: a table of what is done above a progress bar, or plain lines in a log.

rich draws the former; without it, as on machines with torch alone, there are lines everywhere.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from . import results
from .case import Case, short

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 170  # of a log


class Show:
    """Use as a context; `begin` before each case, `done` after it."""

    def __init__(self, total: int, console: Any = None) -> None:
        self._console = find_console() if console is None else console
        self._done: list[dict] = []
        self._total, self._live = total, None

    def __enter__(self) -> Show:
        if self._console is not None and self._console.is_terminal:
            from rich.live import Live
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
            from rich.progress import TimeElapsedColumn as Elapsed

            bar = (BarColumn(bar_width=24), MofNCompleteColumn(), Elapsed())
            text = TextColumn("{task.description}", markup=False)
            self._progress = Progress(*bar, text, console=self._console)
            self._task = self._progress.add_task("", total=self._total)
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def begin(self, case: Case) -> None:
        if self._live is not None:
            text = f"{case.suite}  {case.name}  {short(case.dtype)}"
            self._progress.update(self._task, description=text)
            self._refresh()

    def done(self, result: dict) -> None:
        self._done.append(result)
        if self._live is not None:
            self._progress.advance(self._task)
            self._refresh()
        else:
            print(line(result), flush=True)

    def _refresh(self) -> None:
        from rich.console import Group

        self._live.update(Group(table(self._last()), self._progress))

    def _last(self) -> list[dict]:
        """As many results as the terminal has lines for, beside the header and the bar."""
        lines, shown = self._console.size.height - 3, []
        for result in reversed(self._done):
            lines -= len(results.timed(result))
            if lines < 0:
                break
            shown.append(result)
        return shown[::-1]

    def summary(self, found: list[dict]) -> None:
        """The whole table, and who was left out."""
        if self._console is not None:
            self._console.print(table(found))
        left_out = "\n".join(f"  {line}" for line in reasons(found))
        print(f"\nLeft out, and of how many cases:\n{left_out}\n", flush=True)


def find_console() -> Any:
    """rich's, as wide as a log needs where it is no terminal; None without rich."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def line(result: dict) -> str:
    """One result in a log."""
    where = f"{result['suite']:<20} {result['case']:<44} {short(result['dtype']):<5}"
    mine = results.fastest(result, ours=True)
    if mine is None:
        peers = result["peers"].items()
        why = [f"{n}: {p['refused']}" for n, p in peers if n.startswith("fastattn")]
        why = [text for text in why if ": not for " not in text] or why
        return f"{where} ours can't: {'; '.join(why)}"
    share = result["peers"][mine]["share_of_floor"]
    error = results.error(result["peers"][mine])
    words = [f"{milliseconds(results.median(result, mine))} ms"]
    words += [f"{share:.0%} of the floor"] if share else []
    words += [f"error {error:.1e}"] if error is not None else []
    ratio = results.ratio(result)
    words += [f"×{ratio:.2f} of {result['baseline']}"] if ratio else []
    return f"{where} {', '.join(words)}"


def milliseconds(seconds: float) -> str:
    """Three digits: 0.0123, 1.23, 123."""
    ms = 1e3 * seconds
    return f"{ms:.3g}" if ms < 1000 else f"{ms:.0f}"


def reasons(found: Iterable[dict]) -> list[str]:
    """Who could not take cases and why, a line a reason."""
    names: dict[str, dict[str, int]] = {}  # by reason and peer: cases
    for result in found:
        for name, peer in result["peers"].items():
            if "refused" in peer:
                cases = names.setdefault(peer["refused"], {})
                cases[name] = cases.get(name, 0) + 1
    return [
        f"{reason}: {', '.join(f'{name} ({n})' for name, n in cases.items())}"
        for reason, cases in sorted(names.items())
    ]


def table(found: Iterable[dict]) -> Table:
    """A row a peer, the fastest first."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for column in ("suite", "case", "dtype", "peer"):
        shown.add_column(column, no_wrap=True)
    for column in ("ms", "quartiles", "floor", "error", "peak MiB", "× ours"):
        shown.add_column(column, justify="right", no_wrap=True)
    before = ()
    for result in found:
        timed = results.timed(result)
        mine = results.fastest(result, ours=True)
        for name in sorted(timed, key=lambda name: results.median(result, name)):
            here = results.key(result)
            head = ("", "", "") if here == before else (*here[:2], short(here[2]))
            before, ours = here, timed[name].get("ours", False)
            cells = cells_of(result, name, mine)
            shown.add_row(*head, name, *cells, style="bold" if ours else None)
    return shown


def cells_of(result: dict, name: str, mine: str | None) -> tuple[str, ...]:
    peer, seconds = result["peers"][name], result["peers"][name]["seconds"]
    share, error, peak = peer.get("share_of_floor"), results.error(peer), peer.get("peak_bytes")
    times = None if mine is None else seconds["median"] / results.median(result, mine)
    return (
        milliseconds(seconds["median"]),
        f"{milliseconds(seconds['lower'])}–{milliseconds(seconds['upper'])}",
        "" if share is None else f"{share:.0%}",
        "" if error is None else f"{error:.1e}",
        "" if peak is None else f"{peak / 2**20:.1f}",
        "" if times is None else f"{times:.2f}",
    )
