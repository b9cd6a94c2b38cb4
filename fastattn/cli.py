"""The command line: `fastattn COMMAND`, or `python -m fastattn COMMAND`."""

from __future__ import annotations

import difflib
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "info": "the machine, the backends, and why each is or isn't usable",
    "prepare": "turn text into a dataset folder of tokens",
    "train": "train a GPT on a dataset folder, or resume a run",
    "eval": "the exact loss of a trained model on a whole split",
    "generate": "continue a prompt",
    "export": "write a trained model in Hugging Face's layout",
    "bench": "time the kernels against PyTorch's",
    "demo": "all of it in one go: check, prepare, train, compare, sample",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. What the user can mend is told in one line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, rest = argv[0], argv[1:]
    if name == "--version":
        from . import __version__

        print(f"fastattn {__version__}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(f"fastattn: no command {name!r}{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        run(name, rest)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        if os.environ.get("FASTATTN_TRACEBACK"):
            raise
        print(f"fastattn {name}: {error}", file=sys.stderr)
        return 1
    return 0


def usage() -> str:
    commands = "\n".join(f"  {name:<9}{summary}" for name, summary in COMMANDS.items())
    return f"""usage: fastattn COMMAND [OPTIONS]

{commands}

`fastattn COMMAND --help` tells a command's options.
With FASTATTN_TRACEBACK=1 an error shows where it came from."""


def run(name: str, argv: list[str]) -> None:
    if name == "info":
        info(argv)
    elif name == "bench":
        bench(argv)
    elif importlib.util.find_spec("tyro") is None:
        raise ImportError(f"`fastattn {name}` needs tyro: pip install 'fastattn[train]'")
    else:
        from . import commands

        commands.COMMANDS[name](argv)


def info(argv: list[str]) -> None:
    from .info import report

    if argv and argv[0] not in ("-h", "--help"):
        raise ValueError(f"it takes no options, got {' '.join(argv)}")
    print(f"usage: fastattn info\n\n{COMMANDS['info']}" if argv else report())


def bench(argv: list[str]) -> None:
    """Hand over to benchmarks/bench_cpu.py of the checkout this package is installed from."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "bench_cpu.py").exists():
        raise FileNotFoundError(
            "the benchmarks are in the source repository, not in the package: get a checkout and "
            "run `make bench` there, or python -m benchmarks.bench_cpu"
        )
    sys.path.insert(0, str(root))
    sys.argv = ["fastattn bench", *argv]
    runpy.run_module("benchmarks.bench_cpu", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.exit(main())
