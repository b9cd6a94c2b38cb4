"""fastattn against its peers: `python -m benchmarks --help`, and README.md for the method."""

import os
from typing import Any

# The cores this process may use, read before OpenMP binds the main thread to one of them.
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def unbound() -> dict[str, Any]:
    """For subprocess: that the process may use every core, as this one before it was bound."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    free = (lambda: os.sched_setaffinity(0, CORES)) if CORES else None
    return {"env": variables, "preexec_fn": free}
