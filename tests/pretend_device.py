"""A device named "pretend": tensors on it live in the CPU's memory, but no operator takes them
together with the CPU's own.

Tests and the package's Python run on it as on a GPU, without one: what lies on the wrong device, or
is read where reading would wait for a GPU, shows. `pytest --device pretend` makes tensors there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "pretend"
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default, aten._copy_from.default)
NOT_TENSORS = (aten._local_scalar_dense.default, aten.equal.default, aten.is_same_size.default)


class PretendTensor(Tensor):
    """A tensor on the device, with the CPU tensor that has its numbers."""

    cpu_tensor: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, cpu_tensor: Tensor) -> PretendTensor:
        self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            cpu_tensor.shape,
            strides=cpu_tensor.stride(),
            storage_offset=cpu_tensor.storage_offset(),
            dtype=cpu_tensor.dtype,
            device=torch.device(NAME, 0),
        )
        self.cpu_tensor = cpu_tensor
        return self

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, *args, **(kwargs or {}))

    def tolist(self) -> Any:  # torch's own refuses subclasses
        return self.cpu_tensor.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"pretend {self.cpu_tensor!r}"


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """The operator on the CPU tensors, its results on the device where its arguments are."""
    # as on a GPU: copies cross, and numbers and positions may come from the CPU
    if op not in COPIES and not op.name().startswith("aten::index"):
        for x in pytree.tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and not isinstance(x, PretendTensor) and x.dim() > 0:
                raise RuntimeError(f"{op}: all tensors must be on the device, not on {x.device}")
    target = kwargs.get("device")
    cpu_args, cpu_kwargs = pytree.tree_map(_to_cpu, (args, kwargs))
    if op is aten._copy_from.default:
        cpu_args[1].copy_(cpu_args[0])
        return args[1]
    result = op(*cpu_args, **cpu_kwargs)
    if op in NOT_TENSORS or (target is not None and torch.device(target).type == "cpu"):
        return result
    if op is aten.copy_.default:
        return args[0]
    result = pytree.tree_map(lambda x: PretendTensor(x) if isinstance(x, Tensor) else x, result)
    return return_and_correct_aliasing(op, args, kwargs, result)


def _to_cpu(x: Any) -> Any:
    if isinstance(x, PretendTensor):
        return x.cpu_tensor
    return torch.device("cpu") if isinstance(x, torch.device) else x


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@functools.cache
def register() -> torch.library.Library:
    """Makes torch know the device, for as long as the process lasts."""
    _setup_privateuseone_for_python_backend(NAME, _Module())
    library = torch.library.Library("aten", "IMPL")
    made = (aten.empty.memory_format, aten.empty_strided.default, aten._copy_from.default)
    for op in (*made, aten.arange.default, aten.arange.start, aten.arange.start_step):
        library.impl(op, functools.partial(_run, op), "PrivateUse1")
    return library
