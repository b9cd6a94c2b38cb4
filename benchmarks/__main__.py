"""`python -m benchmarks`. A thread a core, bound to it: OpenMP reads this when torch is loaded.

Not where a GPU is timed, in a supervised child: compilers there would all inherit one core.
"""

import os
import sys

if "--supervised" not in sys.argv:
    os.environ.setdefault("OMP_PROC_BIND", "true")
    os.environ.setdefault("OMP_PLACES", "cores")

from .cli import main

sys.exit(main())
