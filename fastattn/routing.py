"""Routes torch's own F.scaled_dot_product_attention through fastattn, for a block or a process.

The attribute of torch.nn.functional is replaced by `_routed`, which asks of each call whether
fastattn's kernels take it and leaves the others to torch, counted and with the reason.
torch.compile inlines it, and guards on which function the attribute holds: code compiled before or
under a routing is compiled anew once that changes.

torch.nn.attention.register_flash_attention_impl is not how: it swaps the kernel of calls that torch
has already decided to give to its flash backend, which on the CPU excludes dropout, masks that want
a gradient and D_v ≠ D, and on CUDA every mask and all GPUs before sm_80.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.jit._builtins import _register_builtin
from torch.overrides import handle_torch_function

from . import backends, validate
from .attention import autocasting
from .autograd import transformed
from .problem import AttentionProblem
from .scaled_dot_product import scaled_dot_product_attention

_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor, type(None))
_torchs = F.scaled_dot_product_attention  # what the outermost routing found
_routings: list[SdpaRouting] = []  # in force, outermost first


class SdpaRouting:
    """What `sdpa` and `replace_sdpa` give: who computed the calls so far. Print it."""

    def __init__(self) -> None:
        self.fastattn = 0  # calls
        self.torch: Counter[str] = Counter()  # calls left to torch, by reason

    def restore(self) -> None:
        """Gives F.scaled_dot_product_attention back, unless another routing is still in force.

        Raises RuntimeError if something else has replaced it in the meantime.
        """
        if self not in _routings:
            return
        if len(_routings) == 1:
            if F.scaled_dot_product_attention is not _routed:
                raise RuntimeError(
                    "F.scaled_dot_product_attention was replaced again since; undo that first"
                )
            F.scaled_dot_product_attention = _torchs
        _routings.remove(self)

    def __str__(self) -> str:
        lines = [f"fastattn  {self.fastattn} calls"]
        lines += [f"torch     {n} calls: {reason}" for reason, n in self.torch.most_common()]
        return "\n".join(lines)


def replace_sdpa() -> SdpaRouting:
    """F.scaled_dot_product_attention is fastattn's from now on, until `.restore()`.

    Calls on CPU and CUDA tensors in fp32, bf16 or fp16 go to fastattn's kernels, also in
    nn.MultiheadAttention and under torch.compile. What they can't take goes to torch's own, with a
    warning the first time each reason comes up: other devices, dtypes and head dims, nested tensors
    and other subclasses, torch.func transforms, forward-mode AD, calls under
    torch.nn.attention.sdpa_kernel that rule out the flash backend, such as its MATH, and what isn't
    valid, so that errors are torch's.

    Not reached: names that other modules bound before (`from torch.nn.functional import
    scaled_dot_product_attention`), TorchScript, which keeps torch's, and C++ callers.

    Returns:
        The routing, which counts: print it to see which calls ran where. Calls in compiled code
        count when they are traced, not when they run.
    """
    global _torchs
    if not _routings:
        _torchs = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = _routed
    routing = SdpaRouting()
    _routings.append(routing)
    return routing


@contextmanager
def sdpa() -> Iterator[SdpaRouting]:
    """`replace_sdpa` for a block, or as a decorator for a function.

    with fastattn.sdpa() as routing:
        model(x)
    print(routing)
    """
    routing = replace_sdpa()
    try:
        yield routing
    finally:
        routing.restore()


def _constant_when_traced(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result, which would import Dynamo: a second and a half."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _routed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's scaled_dot_product_attention, routed by fastattn."""
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    if type(attn_mask).__name__ == "CausalBias":
        # torch.nn.attention.bias's, whose import takes a second. It looks for the attribute of F by
        # identity, which is this function, and then calls that with plain tensors.
        return handle_torch_function(
            _routed, (attn_mask,), *arguments, scale=scale, enable_gqa=enable_gqa
        )
    reason = _refusal(query, key, value, attn_mask, dropout_p)
    if reason is None:
        try:
            out = scaled_dot_product_attention(*arguments, scale=scale, enable_gqa=enable_gqa)
            _record(None)
            return out
        except (TypeError, ValueError) as error:  # before any kernel ran: torch is to judge
            if torch.compiler.is_compiling():
                raise
            reason = f"{error}"
    _record(reason)
    return _torchs(*arguments, scale=scale, enable_gqa=enable_gqa)


# TorchScript can't compile it, and sees torch's own operator in its place.
_register_builtin(_routed, "aten::scaled_dot_product_attention")


def _refusal(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float
) -> str | None:
    """None, or why fastattn leaves this call, if it is valid, to torch."""
    for t in (query, key, value, attn_mask):
        if type(t) not in _PLAIN:
            return f"an argument is a {type(t).__name__}"
        if t is not None and t.is_nested:
            return "an argument is a nested tensor"
    if not torch.compiler.is_compiling():
        if transformed():
            return "inside a transform of torch.func"
        if torch.autograd.forward_ad._current_level >= 0:
            return "inside forward-mode AD"
    device, dtype = query.device, query.dtype
    if device.type not in ("cpu", "cuda"):
        return f"device {device.type}"
    if dtype not in backends.KERNEL_DTYPES:
        return f"dtype {dtype}"
    if query.dim() == 0 or value.dim() == 0:
        return "too few dimensions"
    head_dim, head_dim_v = _bucket(query.shape[-1]), _bucket(value.shape[-1])
    if head_dim is None or head_dim_v is None:
        return f"head dim not in [1, {validate.MAX_HEAD_DIM}]"
    if not _flash_allowed():
        return "sdpa_kernel rules out the flash backend"
    if autocasting(query):
        dtype = torch.get_autocast_dtype(device.type)
    has_mask = attn_mask is not None and attn_mask.dtype == torch.bool
    has_bias = attn_mask is not None and not has_mask
    traits = [head_dim, head_dim_v, int(has_mask), int(has_bias), 0]
    if dropout_p > 0:  # a branch: Dynamo may see a symbol, and this makes it a plain number
        traits[-1] = 1
    return _no_kernel(device, dtype, *traits)


def _bucket(head_dim: int) -> int | None:
    """The next size kernels are built for; a plain int also of a dimension that is symbolic."""
    for size in (32, 64, 96, 128, 192, validate.MAX_HEAD_DIM):
        if 1 <= head_dim <= size:
            return size
    return None


@_constant_when_traced
def _flash_allowed() -> bool:
    return torch.backends.cuda.flash_sdp_enabled()  # of the CPU too, despite its name


@_constant_when_traced
def _no_kernel(device: torch.device, dtype: torch.dtype, *traits: int) -> str | None:
    """None, or why no kernel takes such problems. What FASTATTN_BACKEND asks for is what runs."""
    return None if backends.requested(None) else _kernels_refuse(device, dtype, *traits)


@functools.cache
def _kernels_refuse(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    has_mask: int,
    has_bias: int,
    has_dropout: int,
) -> str | None:
    q = torch.zeros(1, 1, 1, head_dim, device=device, dtype=dtype)
    v = torch.zeros(1, 1, 1, head_dim_v, device=device, dtype=dtype)
    p = AttentionProblem(
        q,
        q,
        v,
        mask=q[..., :1] == 0 if has_mask else None,
        bias=q[..., :1] if has_bias else None,
        seed=torch.zeros((), dtype=torch.int64, device=device) if has_dropout else None,
        dropout_p=0.5 if has_dropout else 0.0,
    )
    reasons = []
    for row in backends.TABLE:
        if row.name != "reference":
            if (reason := row.refuses(p)) is None:
                return None
            reasons.append(f"{row.name}: {reason}")
    return f"no kernel takes it ({'; '.join(reasons)})"


@_constant_when_traced
def _record(reason: str | None) -> None:
    for routing in _routings:
        if reason is None:
            routing.fastattn += 1
        else:
            routing.torch[reason] += 1
    if reason is not None:
        _warn_once(reason)


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"fastattn leaves scaled_dot_product_attention to torch: {reason}."
        " Printing what replace_sdpa() or sdpa() gave tells how often.",
        stacklevel=4,
    )
