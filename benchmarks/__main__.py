"""`python -m benchmarks`. A thread a core, bound to it: OpenMP reads this when torch is loaded."""

import os

os.environ.setdefault("OMP_PROC_BIND", "true")
os.environ.setdefault("OMP_PLACES", "cores")

import sys

from .cli import main

sys.exit(main())
