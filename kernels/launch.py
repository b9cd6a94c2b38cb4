"""How every kernel is launched: planned once for problems of one form, from then on only looked up.

Of a call's time in Python, Triton's own launch takes 15 µs and making a kernel's arguments another
10. All of that is the same for the next problem of the same shapes, strides, dtypes, alignments and
options: all but the tensors themselves. So a plan is kept, and where its arguments have tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import interpreter, tuning
from .configs import Tile

MOST_PLANS = 4096  # of one kernel; then it starts anew


class Launch(NamedTuple):
    """A kernel on a problem. Its tensors are those that its launcher was called with."""

    kernel: Any
    programs: int  # with none there is nothing to do
    arguments: tuple[Any, ...]  # up to the first constant; tuples hold tensors too
    constants: dict[str, Any]  # the constexpr arguments
    tile: Tile

    def run(self) -> Any:
        """Compiles it if need be; returns what it compiled to."""
        return self.kernel[(self.programs,)](*self.arguments, **self.constants, **self.tile.options)

    @property
    def all_arguments(self) -> list[Any]:
        """In the order of the kernel's."""
        names = self.kernel.arg_names[len(self.arguments) :]
        return [*self.arguments, *(self.constants[name] for name in names)]


class Planned(NamedTuple):
    """What is left to do for a launch: put the tensors in."""

    start: Callable[..., None]
    arguments: list[Any]
    places: Places


Places = list[tuple[int, Any]]  # (index, a tensor's number), or (index, (a tuple's rest, places))
Plan = Callable[..., Launch]


def launcher(tile: Callable[..., Tile], *, tuned: bool = False) -> Callable[[Plan], Launcher]:
    """Makes of `plan(tile, problem, *others)`, which says what to launch, a function of (problem,
    *others) that does. `tile(problem, *others)` is the one to use, unless tuning.py has found a
    better one: if `tuned`, which asks of a kernel that it writes only to `others`."""
    return lambda plan: Launcher(plan, tile, tuned)


class Launcher:
    def __init__(self, plan: Plan, tile: Callable[..., Tile], tuned: bool):
        self.plan, self.tile, self.tuned = plan, tile, tuned
        self.kept: dict[tuple[Any, ...], Planned | None] = {}

    def __call__(self, problem: tuple[Any, ...], *others: Any) -> None:
        values = (*problem, *others)
        if interpreter.running():
            launch = self.plan(self.tile(problem, *others), problem, *others)
            if launch.programs:
                launch.run()
            return
        key = (
            triton.runtime.driver.active.get_current_device(),
            torch.get_float32_matmul_precision(),
            *[form_of(x) if isinstance(x, Tensor) else x for x in values],
        )
        try:
            planned = self.kept[key]
        except KeyError:
            self._first(key, problem, others)
        else:
            if planned is not None:
                planned.start(*filled(planned.arguments, planned.places, values))

    def _first(self, key: tuple[Any, ...], problem: Any, others: tuple[Any, ...]) -> None:
        # Each in an object of its own: where this problem has one twice, the next may have two.
        problem = type(problem)(*map(alias, problem))
        others = tuple(map(alias, others))
        tile, settled = self.tile(problem, *others), True
        launch = self.plan(tile, problem, *others)
        if launch.programs and self.tuned and tuning.on():
            scratch = tuple(torch.empty_like(x) if isinstance(x, Tensor) else x for x in others)
            tile, settled = tuning.best(launch, lambda tile: self.plan(tile, problem, *scratch))
            launch = self.plan(tile, problem, *others)
        planned = None
        if launch.programs:
            compiled, arguments = launch.run(), launch.all_arguments
            places = places_of(arguments, [id(x) for x in (*problem, *others)])
            planned = Planned(compiled[(launch.programs, 1, 1)], arguments, places)
        if settled:
            if len(self.kept) >= MOST_PLANS:
                self.kept.clear()
            self.kept[key] = planned


def form_of(t: Tensor) -> tuple[Any, ...]:
    """All that a plan depends on: Triton compiles for pointers that are multiples of 16."""
    return t.shape, t.stride(), t.dtype, t.data_ptr() % 16


def alias(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def places_of(arguments: list[Any], tensors: list[int]) -> Places:
    """Where the tensors of these ids are, which are taken out."""
    places: Places = []
    for at, x in enumerate(arguments):
        if isinstance(x, Tensor):
            places.append((at, tensors.index(id(x))))
            arguments[at] = None
        elif isinstance(x, tuple):
            inner = list(x)
            if inner_places := places_of(inner, tensors):
                places.append((at, (inner, inner_places)))
                arguments[at] = None
    return places


def filled(arguments: list[Any], places: Places, tensors: tuple[Any, ...]) -> list[Any]:
    arguments = arguments.copy()
    for at, place in places:
        if type(place) is int:
            arguments[at] = tensors[place]
        else:
            arguments[at] = tuple(filled(place[0], place[1], tensors))
    return arguments
