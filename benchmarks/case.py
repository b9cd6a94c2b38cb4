"""What is timed: a Case is a piece of work, a Peer somebody who may do it, a Call it being done.

Peers are found if installed and never required. A peer that can't take a case is shown with its
reason: `Peer.refuses` knows what can be told beforehand, and what it raises tells the rest.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastattn import backends

DEVICES = ("cpu", "cuda")
DEVICES_OF = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)}  # of fastattn's backends

Streaming = Literal["", "read", "copied", "rewritten"]  # "rewritten": in place
Inputs = dict[str, Any]  # by the names of the glossary; the same tensors for every peer
Results = Mapping[str, Tensor]  # likewise, in fastattn's layouts


@dataclass
class Call:
    """One peer on one case. Only `run` is timed; `before` goes ahead of every one."""

    run: Callable[[], Any]
    results: Callable[[Any], Results]  # of what `run` returned
    before: Callable[[], object] | None = None
    release: Callable[[], object] | None = None  # frees what the last call has left
    facts: dict[str, float] = field(default_factory=dict)  # to tell besides the time

    def first(self) -> Results:
        if self.before is not None:
            self.before()
        return self.results(self.run())


@dataclass(frozen=True, kw_only=True)
class Case:
    """The sizes of one piece of work. A subclass a kind of work, a field a size."""

    suite: str
    dtype: torch.dtype
    rank: int = 1  # 0 comes first: the most telling
    quick: bool = False  # part of a --quick run

    baseline: ClassVar[str] = "torch"  # the peer that ours is set against first
    cold: ClassVar[bool] = True  # caches are cleared before every timed call (GPUs)
    once: ClassVar[bool] = False  # too long to repeat: the first call is what counts
    timed_only: ClassVar[bool] = False  # no tensors: neither errors nor memory
    wrong_beyond: ClassVar[float] = 0.05  # of the largest element: such a result is refused

    @property
    def name(self) -> str:
        raise NotImplementedError

    @property
    def features(self) -> frozenset[str]:
        """What a peer must be able to do besides the plain work."""
        return frozenset()

    @property
    def random(self) -> bool:
        """Only who draws the same numbers from the same seed can be checked: fastattn's peers."""
        return False

    @property
    def flops(self) -> float:
        """Of matrix products, those that masks leave no need for not counted."""
        return 0.0

    @property
    def moved_bytes(self) -> float:
        """That must be read from and written to memory at least."""
        return 0.0

    @property
    def streaming(self) -> Streaming:
        """How these bytes go, of work that does little else: on CPUs the same is timed beside it.

        What memory gives differs from minute to minute on shared machines, and by size in caches.
        """
        return ""

    @property
    def tokens(self) -> int | None:
        """Of a training step."""
        return None

    def inputs(self, device: torch.device) -> Inputs:
        raise NotImplementedError

    def exact(self, inputs: Inputs) -> dict[str, Tensor]:
        """What `parts` of the results should be, in fp64."""
        raise NotImplementedError

    def parts(self, name: str, result: Tensor) -> Tensor:
        """The part of a result that is checked: fp64 of everything would take too long."""
        raise NotImplementedError

    def generator(self, device: torch.device) -> torch.Generator:
        """The same numbers in every run."""
        return torch.Generator(device).manual_seed(zlib.crc32(self.name.encode()))


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Somebody who may do a case."""

    name: str
    suites: frozenset[str]
    prepare: Callable[[Case, Inputs], Call]
    module: str = "torch"  # imported first: absent, the peer is
    devices: tuple[str, ...] = DEVICES
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    features: frozenset[str] = frozenset()  # of Case.features, those it has
    compiles: bool = False  # seconds to minutes at the first call
    backend: str | None = None  # the row of fastattn's table, of a peer that is ours
    unfit: Callable[[Case], str | None] = field(default=lambda case: None)  # another reason

    @property
    def ours(self) -> bool:
        return self.backend not in (None, "reference")

    def refuses(self, case: Case, device: torch.device) -> str | None:
        """None, or why it can't take the case."""
        if device.type not in self.devices:
            return f"not for {device.type}"
        if case.dtype not in self.dtypes:
            return f"no {short(case.dtype)}"
        if missing := case.features - self.features:
            return "no " + ", ".join(sorted(missing))
        return self.unfit(case) or self.absent()

    def absent(self) -> str | None:
        """None, or why there is none of it here."""
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            package = self.module.partition(".")[0]
            absent = isinstance(error, ModuleNotFoundError) and error.name == package
            return "not installed" if absent else f"{self.module} can't be imported: {error}"
        except Exception as error:  # a package that breaks on import breaks nothing here
            return f"{self.module} can't be imported: {error}"
        return None


def our_peers(suites: frozenset[str], prepare: Callable, features: frozenset[str]) -> list[Peer]:
    """A peer a row of fastattn's table; its reference row is the eager path, everybody's peer."""
    return [
        Peer(
            name="eager" if row.name == "reference" else f"fastattn {row.name}",
            suites=suites,
            prepare=prepare(row.name),
            features=features,
            devices=DEVICES_OF.get(row.name, DEVICES),
            backend=row.name,
            unfit=lambda case, row=row: row.unusable(),
        )
        for row in backends.TABLE
    ]


def short(dtype: torch.dtype | str) -> str:
    """torch.bfloat16 or "bfloat16" → "bf16"."""
    name = str(dtype).removeprefix("torch.")
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(name, name)


def randn(
    generator: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0
) -> Tensor:
    numbers = torch.randn(shape, generator=generator, device=generator.device)
    return (numbers * scale).to(dtype)
