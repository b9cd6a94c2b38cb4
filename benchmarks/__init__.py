"""fastattn against its peers: `python -m benchmarks --help`, and README.md for the method."""

import os

# The cores this process may use, read before OpenMP binds the main thread to one of them.
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
