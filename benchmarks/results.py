"""Results files: one JSON a run, checked against SCHEMA when written and when read.

They lie in results/<kind of machine>/<date>-<commit>.json. A file is whole after every case, so
that a run which is cut loses nothing that was finished.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastattn.files import read_json, write_json

RESULTS = Path(__file__).parent / "results"
VERSION = 2

Document = dict[str, Any]
Kinds = dict[str, list[tuple[Path, Document]]]  # by kind of machine, newest first
NUMBER = (int, float)
OPTIONAL_NUMBER = (int, float, type(None))

# A dict: those keys, "?" at the end of those that may be absent. A list: of such. A tuple: types.
# {"*": x}: any names.
SCHEMA = {
    "version": int,
    "complete": bool,  # nothing is missing
    "missing?": [[str]],  # keys of cases that were asked for and not reached yet
    "seconds": NUMBER,  # that it took
    "options": {"*": object},
    "machine": {
        "kind": str,
        "device": str,
        "date": str,
        "commit": str,
        "cpu": str,
        "threads": int,
        "isa": str,
        "torch": str,
        "python": str,
        "*": object,
    },
    "ceilings": {"gemm_flops": {"*": NUMBER}, "fma_flops": NUMBER, "memory_bytes": NUMBER},
    "clocks": [{"*": OPTIONAL_NUMBER}],  # each time the ceilings were measured
    "lost?": [  # what took the process down; peer "" is the timing of all
        {"suite": str, "case": str, "dtype": str, "peer": str, "reason": str}
    ],
    "results": [
        {
            "suite": str,
            "case": str,
            "dtype": str,
            "rank": int,
            "baseline": str,
            "flops": NUMBER,
            "moved_bytes": NUMBER,
            "tokens": (int, type(None)),
            "streaming_seconds?": NUMBER,  # of memory, in the same rounds
            "floor_seconds": OPTIONAL_NUMBER,
            "bound": (str, type(None)),
            "peers": {
                "*": {
                    "ours?": bool,
                    "refused?": str,  # why: nothing else then
                    "seconds?": {
                        "median": NUMBER,
                        "lower": NUMBER,
                        "upper": NUMBER,
                        "best?": NUMBER,
                        "quiet_rounds": int,
                        "rounds": int,
                    },
                    "errors?": {"*": NUMBER},  # the largest, against fp64, of each result
                    "peak_bytes?": OPTIONAL_NUMBER,
                    "share_of_floor?": OPTIONAL_NUMBER,
                    "facts?": {"*": NUMBER},
                }
            },
        }
    ],
}


def check(value: Any, schema: Any = SCHEMA, where: str = "document") -> None:
    """Raises ValueError naming the first place that is not as the schema has it."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object, is {type(value).__name__}")
        named = {key.rstrip("?"): key for key in schema if key != "*"}
        for name, key in named.items():
            if name in value:
                check(value[name], schema[key], f"{where}.{name}")
            elif not key.endswith("?"):
                raise ValueError(f"{where} has no {name}")
        for name in value.keys() - named.keys():
            if "*" not in schema:
                raise ValueError(f"{where} has an unknown key {name}")
            check(value[name], schema["*"], f"{where}.{name}")
    elif isinstance(schema, list):
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, is {type(value).__name__}")
        for number, item in enumerate(value):
            check(item, schema[0], f"{where}[{number}]")
    elif not isinstance(value, schema) or (
        isinstance(value, bool) and schema not in (bool, object)
    ):
        raise ValueError(f"{where} has a {type(value).__name__}: {value!r}")


def write(path: Path, document: Document) -> None:
    check(document)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, document)


def read(path: Path) -> Document:
    document = read_json(path)
    try:
        check(document)
    except ValueError as error:
        raise ValueError(f"{path} is no results file: {error}") from None
    if document["version"] != VERSION:
        raise ValueError(f"{path} has version {document['version']}, this reads {VERSION}")
    return document


def read_all(folders: Iterable[Path]) -> list[tuple[Path, Document]]:
    """Every results file under the folders (or files), oldest first.

    Not gpu-*.json, beside them: those are the journals of `make gpu`.
    """
    paths = {
        path
        for folder in folders
        for path in ([folder] if folder.is_file() else folder.rglob("*.json"))
        if not path.name.startswith("gpu-")
    }
    found = [(path, read(path)) for path in sorted(paths)]
    return sorted(found, key=lambda pair: pair[1]["machine"]["date"])


def by_kind(documents: list[tuple[Path, Document]]) -> Kinds:
    """For each kind of machine its files, newest first, each without the cases of newer ones.

    Kinds with the newest file come first, those that were held to an instruction set last.
    """
    kinds: Kinds = {}
    seen: set[tuple[str, ...]] = set()
    for path, document in reversed(documents):
        kind = document["machine"]["kind"]
        left = [r for r in document["results"] if (kind, *key(r)) not in seen]
        seen |= {(kind, *key(r)) for r in left}
        if left:
            kinds.setdefault(kind, []).append((path, document | {"results": left}))
    return dict(sorted(kinds.items(), key=lambda pair: is_held(pair[1][0][1])))


def is_held(document: Document) -> bool:
    """Whether the run was made to leave wider instructions of its processor unused."""
    return "FASTATTN_CPU_ISA" in document["machine"].get("environment", {})


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """A run's options for its record: all but the path that it is written to."""
    return {name: value for name, value in vars(args).items() if name != "out"}


def path_of(out: Path, machine: dict[str, Any]) -> Path:
    """`out` if it is a JSON file, else <kind of machine>/2026-11-24-9641fe9.json in that folder."""
    if out.suffix == ".json":
        return out
    return out / machine["kind"] / f"{machine['date'][:10]}-{machine['commit']}.json"


# ---- what a result says ------------------------------------------------------------------------


def key(result: dict) -> tuple[str, str, str]:
    return result["suite"], result["case"], result["dtype"]


def timed(result: dict) -> dict[str, dict]:
    """The peers that took the case."""
    return {name: p for name, p in result["peers"].items() if "seconds" in p}


def median(result: dict, peer: str) -> float:
    return result["peers"][peer]["seconds"]["median"]


def fastest(result: dict, ours: bool) -> str | None:
    """The fastest of ours, or of the others."""
    found = [name for name, p in timed(result).items() if p.get("ours", False) == ours]
    return min(found, key=lambda name: median(result, name), default=None)


def ratio(result: dict, peer: str | None = None) -> float | None:
    """The peer's time (the baseline's) over our best: above 1 we are faster."""
    mine, peer = fastest(result, ours=True), peer or result["baseline"]
    if mine is None or peer not in timed(result):
        return None
    return median(result, peer) / median(result, mine)


def error(peer: dict) -> float | None:
    """The largest of its errors."""
    return max(peer["errors"].values()) if peer.get("errors") else None
