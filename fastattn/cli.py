"""The command line: `fastattn COMMAND`, or `python -m fastattn COMMAND`."""

from __future__ import annotations

import difflib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "info": "the machine, the backends, and why each is or isn't usable",
    "check": "hold the kernels to float64 on this GPU; those that pass are chosen from then on",
    "prepare": "turn text into a dataset folder of tokens",
    "train": "train a GPT on a dataset folder, or resume a run",
    "eval": "the exact loss of a trained model on a whole split",
    "generate": "continue a prompt",
    "export": "write a trained model in Hugging Face's layout",
    "bench": "time the kernels against PyTorch's and other packages'",
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
        status = run(name, rest)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `fastattn … | head`: the reader has seen enough
        # What is buffered would raise once more when Python flushes it at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        if os.environ.get("FASTATTN_TRACEBACK"):
            raise
        print(f"fastattn {name}: {error}", file=sys.stderr)
        return 1


def usage() -> str:
    commands = "\n".join(f"  {name:<10}{summary}" for name, summary in COMMANDS.items())
    return f"""usage: fastattn COMMAND [OPTIONS]

{commands}

`fastattn COMMAND --help` tells a command's options.
With FASTATTN_TRACEBACK=1 an error shows where it came from."""


def run(name: str, argv: list[str]) -> int:
    if name == "bench":
        return bench(argv)
    if name == "check":
        from . import proof

        return proof.main(argv)
    if name == "info":
        info(argv)
    elif importlib.util.find_spec("tyro") is None:
        raise ImportError(f"`fastattn {name}` needs tyro: pip install 'fastattn[train]'")
    else:
        from . import commands

        commands.COMMANDS[name](argv)
    return 0


def info(argv: list[str]) -> None:
    from .info import report

    if argv and argv[0] not in ("-h", "--help"):
        raise ValueError(f"it takes no options, got {' '.join(argv)}")
    print(f"usage: fastattn info\n\n{COMMANDS['info']}" if argv else report())


def bench(argv: list[str]) -> int:
    """Hand over to benchmarks/ of the checkout this package is installed from.

    In a process of its own: threads are bound to cores when torch is loaded, which it is here.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "__main__.py").exists():
        raise FileNotFoundError(
            "the benchmarks are in the source repository, not in the package: get a checkout and "
            "run `make bench` there, or python -m benchmarks"
        )
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "benchmarks", *argv]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode


if __name__ == "__main__":
    sys.exit(main())
