"""Cross-entropy on logits, and fused with the last linear layer so that they never exist whole.

Semantics are torch.nn.functional's for class-index targets; fastattn/reference.py states the
formula. The loss is fp32 (fp64 for fp64 input).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import chunked_loss, reference, validate
from .attention import autocast
from .autograd import FusedFunction, gradient_function, scalar_loss_function, wants_gradient
from .backends import requested
from .problem import CrossEntropyProblem, LinearCrossEntropyProblem, last_stride_one

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    return_lse: bool = False,
    inplace: bool = False,
    backend: str | None = None,
):
    """`torch.nn.functional.cross_entropy` for class indices, in one pass over the logits.

    For "mean" and "sum" without `return_lse` the gradient is computed along with the loss, and held
    until the backward pass.

    Args:
        input: (…, V) logits, float16, bfloat16, float32 (float64: reference). The class is the last
            dimension.
        target: (…) int64, each `ignore_index` or in [0, V).
        weight: (V,) weight of each class. A constant: it gets no gradient.
        reduction: "mean" divides by the number of targets not ignored (by the sum of their
            weights), "sum", or "none".
        label_smoothing: in [0, 1].
        z_loss: adds z_loss · lse² to each row's loss (not multiplied by the class weight).
        softcap: if > 0, logits become softcap · tanh(logits / softcap).
        return_lse: also return the rows' log-sum-exp (…), fp32, differentiable.
        inplace: where a gradient will be wanted, leave it in the logits' memory: `input` is
            overwritten in the forward pass, and there is one backward pass. Needs reduction "mean"
            or "sum" and no `return_lse`. No effect on the reference or under torch.compile. Not for
            float16 with a loss scale: gradients are rounded before it can lift them.

    Returns:
        The loss in fp32: a scalar, or (…) for reduction "none". Ignored rows have loss 0 and
        gradient 0; the mean over no valid row is NaN with gradient 0, as torch's.

    Raises:
        TypeError, ValueError: bad argument. IndexError: a target out of range (on the CPU; a device
            assert elsewhere).
        RuntimeError: the requested backend can't take the problem, or a second backward was asked
            of a fused backend.
    """
    if validate.tensor("input", input).dim() < 1:
        raise ValueError("input must have at least the class dimension, got a scalar")
    validate.same_dtype_and_device(input=input)
    vocab, shape = input.shape[-1], input.shape[:-1]
    _check_target(shape, target, input.device)
    options = _options(
        input, vocab, reduction, weight, ignore_index, label_smoothing, z_loss, softcap
    )
    if inplace and (reduction == "none" or return_lse):
        raise ValueError("inplace needs reduction 'mean' or 'sum' and no return_lse")
    logits = last_stride_one(input.reshape(-1, vocab))
    p = CrossEntropyProblem(logits, target.reshape(-1).contiguous(), **options)
    scale = None if reduction == "none" else _row_scale(p.target, reduction, options, input)
    name = requested(backend)
    if name == "reference" or (name is None and input.dtype == torch.float64):
        validate.targets(p.target, vocab, ignore_index)
        loss, lse = reference.cross_entropy(p)
    elif inplace and wants_gradient(input) and not torch.compiler.is_compiling():
        _check_overwritable(input, logits)
        return CrossEntropyInplaceFunction.apply(*p, scale, name)
    elif scale is not None and not return_lse and wants_gradient(input) and _has_range(input):
        return CrossEntropyScalarFunction.run(*p, scale, name)[0]
    else:
        loss, lse = CrossEntropyFunction.run(*p, name)
    reduced = loss.view(shape) if scale is None else loss.sum() * scale
    return (reduced, lse.view(shape)) if return_lse else reduced


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    return_lse: bool = False,
    workspace_bytes: int = chunked_loss.WORKSPACE_BYTES,
    backend: str | None = None,
):
    """cross_entropy(input @ linear_weightᵀ + linear_bias, target), by chunks of rows.

    The logits never exist as a whole. For "mean" and "sum" without `return_lse` the gradients are
    computed along with the loss: three matrix products, as without chunks. Otherwise the backward
    pass recomputes the logits. They and the sums of the weight's gradient are always fp32.

    Args:
        input: (…, C); linear_weight: (V, C); linear_bias: (V,), all of one dtype (under autocast
            they are cast to its dtype).
        target: (…) int64, each `ignore_index` or in [0, V).
        workspace_bytes: at most this much memory holds logits at a time (but at least one row), and
            on GPUs their gradient in 16 bits. The reference holds them all; Triton's kernel needs
            none where only the loss is wanted.
        The rest, the result and what is raised is as in `cross_entropy`. Argument names are torch
        2.13's.
    """
    input, linear_weight, linear_bias = autocast(input, linear_weight, linear_bias)
    vocab, channels = validate.tensor("linear_weight", linear_weight, 2).shape
    if validate.tensor("input", input).dim() < 1 or input.shape[-1] != channels:
        raise ValueError(
            f"input {tuple(input.shape)} must end in linear_weight's {channels} columns"
        )
    if linear_bias is not None and validate.tensor("linear_bias", linear_bias).shape != (vocab,):
        raise ValueError(f"linear_bias must have shape ({vocab},), got {tuple(linear_bias.shape)}")
    validate.same_dtype_and_device(
        input=input, linear_weight=linear_weight, linear_bias=linear_bias
    )
    shape = input.shape[:-1]
    _check_target(shape, target, input.device)
    options = _options(
        input, vocab, reduction, weight, ignore_index, label_smoothing, z_loss, softcap
    )
    if not isinstance(workspace_bytes, int) or workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes must be an integer > 0, got {workspace_bytes!r}")
    linear = (input.reshape(-1, channels), linear_weight, linear_bias)
    p = LinearCrossEntropyProblem(*linear, target.reshape(-1).contiguous(), **options)
    scale = None if reduction == "none" else _row_scale(p.target, reduction, options, input)
    name = requested(backend)
    if name == "reference" or (name is None and input.dtype == torch.float64):
        validate.targets(p.target, vocab, ignore_index)
        loss, lse = reference.linear_cross_entropy(
            p.x, linear_weight, p.target, linear_bias=linear_bias, **options
        )
    elif scale is not None and not return_lse and wants_gradient(*linear):
        wanted = (t is not None and t.requires_grad for t in linear)
        return LinearCrossEntropyScalarFunction.run(*p, scale, *wanted, workspace_bytes, name)[0]
    else:
        loss, lse = LinearCrossEntropyFunction.run(*p, workspace_bytes, name)
    reduced = loss.view(shape) if scale is None else loss.sum() * scale
    return (reduced, lse.view(shape)) if return_lse else reduced


class CrossEntropyLoss(nn.Module):
    """`cross_entropy` as a module: torch.nn.CrossEntropyLoss, but for logits (…, V)."""

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        backend: str | None = None,
    ):
        super().__init__()
        self.register_buffer("weight", weight)
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
            "backend": backend,
        }

    weight: Tensor | None

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(input, target, self.weight, **self.options)


class LinearCrossEntropyLoss(nn.Module):
    """A linear layer (V, C) and `linear_cross_entropy` on it; keyword options as there."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
        **options: Any,
    ):
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.options = options

    weight: Tensor | None

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        w, b = self.linear.weight, self.linear.bias
        return linear_cross_entropy(
            input, w, target, linear_bias=b, weight=self.weight, **self.options
        )


# ---- arguments ----


def _check_target(shape: torch.Size, target: Tensor, device: torch.device) -> None:
    if validate.tensor("target", target).dtype != torch.int64:
        raise TypeError(f"target must be int64 class indices, got {target.dtype}")
    if target.shape != shape:
        raise ValueError(f"target must have shape {tuple(shape)}, got {tuple(target.shape)}")
    validate.same_device("target", target, "input", device)


def _options(
    input: Tensor,
    vocab: int,
    reduction: str,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> dict[str, Any]:
    """The fields both loss problems share, checked."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
    if weight is not None:
        if validate.tensor("weight", weight).shape != (vocab,) or not weight.is_floating_point():
            raise ValueError(
                f"weight must be floating point of shape ({vocab},), got {weight.dtype}"
                f" {tuple(weight.shape)}"
            )
        validate.same_device("weight", weight, "input", input.device)
        weight = weight.detach().to(validate.accumulator_dtype(input)).contiguous()
    return {
        "weight": weight,
        "ignore_index": ignore_index,
        "label_smoothing": validate.number("label_smoothing", label_smoothing, 0, 1),
        "z_loss": validate.number("z_loss", z_loss, 0),
        "softcap": validate.number("softcap", softcap, 0),
    }


def _check_overwritable(input: Tensor, logits: Tensor) -> None:
    """The (N, V) logits are the input's own memory, and their rows don't overlap."""
    n, vocab = logits.shape
    shared = logits.data_ptr() == input.data_ptr()
    if not shared or (n > 1 and logits.stride(0) < vocab):
        raise ValueError(
            "inplace needs logits that can be viewed as (N, V) rows of their own memory, got shape"
            f" {tuple(input.shape)} with strides {input.stride()}"
        )


def _has_range(logits: Tensor) -> bool:
    """Gradients rounded to this dtype may be scaled afterwards: float16's would have vanished."""
    return logits.dtype != torch.float16


def _row_scale(target: Tensor, reduction: str, options: dict, input: Tensor) -> Tensor:
    """(): the factor of each row's loss. Over no valid row a mean's is inf, and 0 · inf is NaN."""
    dtype = validate.accumulator_dtype(input)
    if reduction == "sum":
        return torch.ones((), dtype=dtype, device=target.device)
    valid = target != options["ignore_index"]
    if (weight := options["weight"]) is None:
        return 1 / valid.sum(dtype=dtype)
    safe = target.where(valid, 0).clamp(0, weight.shape[0] - 1)  # the operator reports bad targets
    return 1 / weight[safe].where(valid, 0.0).sum()


# ---- autograd ----


class CrossEntropyFunction(FusedFunction):
    """(loss, lse) rows; the gradient is made in the backward pass."""

    @staticmethod
    def forward(*args):
        return torch.ops.fastattn.cross_entropy_fwd(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, weight, *ctx.options, ctx.backend = inputs
        ctx.save_for_backward(logits, target, weight, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dloss, dlse):
        logits, target, weight, lse = ctx.saved_tensors
        if dloss is None:
            dloss = torch.zeros_like(lse)
        dlogits = CrossEntropyGradient.run(
            logits, target, weight, *ctx.options, lse, dloss, dlse, ctx.backend
        )
        return dlogits, *(None,) * 7


class CrossEntropyInplaceFunction(torch.autograd.Function):
    """The reduced loss; the logits' memory holds its gradient from the forward pass on."""

    @staticmethod
    def forward(*args):
        *problem, scale, backend = args
        loss, _ = torch.ops.fastattn.cross_entropy_fwd_bwd_(*problem, scale, backend)
        return loss.sum() * scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.spent = False

    @staticmethod
    def backward(ctx, dloss):
        if torch.is_grad_enabled() or ctx.spent:
            raise RuntimeError(
                "inplace cross_entropy has one backward pass, with no graph of its own, for its"
                " gradient is in the logits' memory; leave inplace out"
            )
        ctx.spent = True
        (gradient,) = ctx.saved_tensors
        if gradient.device.type != "cpu" or dloss.item() != 1:  # elsewhere item() would wait
            gradient.mul_(dloss)
        return gradient, *(None,) * 8


class LinearCrossEntropyFunction(FusedFunction):
    """(loss, lse) rows; the backward pass recomputes the logits."""

    @staticmethod
    def forward(*args):
        return torch.ops.fastattn.linear_cross_entropy_fwd(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *fields, ctx.workspace_bytes, ctx.backend = inputs
        ctx.options = fields[5:]
        ctx.save_for_backward(*fields[:5], output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dloss, dlse):
        *tensors, lse = ctx.saved_tensors
        if dloss is None:
            dloss = torch.zeros_like(lse)
        dx, dw, dbias = LinearCrossEntropyGradient.run(
            *tensors, *ctx.options, lse, dloss, dlse, ctx.workspace_bytes, ctx.backend
        )
        return dx, dw, dbias if tensors[2] is not None else None, *(None,) * 8


def _loss_and_gradient(*args):
    """The reduced loss of (*problem, scale, backend), and its gradient."""
    loss, dlogits = torch.ops.fastattn.cross_entropy_fwd_bwd(*args)
    return loss.sum() * args[-2], dlogits


CrossEntropyScalarFunction = scalar_loss_function(_loss_and_gradient, leaves=1)
LinearCrossEntropyScalarFunction = scalar_loss_function(
    lambda *args: torch.ops.fastattn.linear_cross_entropy_fwd_bwd(*args), leaves=3
)
CrossEntropyGradient = gradient_function(torch.ops.fastattn.cross_entropy_bwd)
LinearCrossEntropyGradient = gradient_function(torch.ops.fastattn.linear_cross_entropy_bwd)
