"""Callbacks on imports: in fresh processes, since a module is imported once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SETUP = """
import sys
from fastattn.when_imported import when_imported
before = list(sys.meta_path)
calls = []
when_imported("colorsys", lambda: calls.append(hasattr(sys.modules["colorsys"], "rgb_to_hsv")))
"""


def run(code: str) -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", SETUP + code], capture_output=True, text=True, cwd=root
    )
    assert done.returncode == 0, done.stderr


def test_it_runs_after_the_module_and_once() -> None:
    run("""
assert not calls and "colorsys" not in sys.modules
import json.tool, colorsys
assert calls == [True] and sys.meta_path == before
import importlib; importlib.reload(colorsys)
assert calls == [True]
""")


def test_it_runs_at_once_where_the_module_is_there() -> None:
    run("""
import colorsys
when_imported("colorsys", lambda: calls.append("again"))
assert calls == [True, "again"] and sys.meta_path == before
""")


def test_a_module_that_is_not_there() -> None:
    run("""
when_imported("no_such_module", lambda: calls.append("never"))
try:
    import no_such_module
except ModuleNotFoundError:
    pass
else:
    raise AssertionError
assert not calls
""")


def test_flop_formulas_wait_for_the_counter() -> None:
    run("""
import torch, fastattn
assert "fastattn.flop_formulas" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
q = torch.randn(1, 8, 2, 16)
with FlopCounterMode(display=False) as counter:
    fastattn.attention(q, q, q)
assert counter.get_total_flops() == 2 * 2 * 2 * 8 * 8 * 16
""")
