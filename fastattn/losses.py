"""Cross-entropy on logits, and fused with the last linear layer so that the logits never exist as a whole.

Semantics are torch.nn.functional's for class-index targets; fastattn/reference.py states the formula. The loss is fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import chunked_loss, reference, validate
from .attention import NO_SECOND_BACKWARD, vmap_by_loop
from .backends import requested
from .problem import CrossEntropyProblem

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

    Args:
        input: (…, V) logits, float16, bfloat16, float32 (float64: reference). The class is the last dimension.
        target: (…) int64, each `ignore_index` or in [0, V).
        weight: (V,) weight of each class.
        reduction: "mean" divides by the number of targets not ignored (by the sum of their weights), "sum", or "none".
        label_smoothing: in [0, 1].
        z_loss: adds z_loss · lse² to each row's loss (not multiplied by the class weight).
        softcap: if > 0, logits become softcap · tanh(logits / softcap).
        return_lse: also return the rows' log-sum-exp (…), fp32, differentiable.
        inplace: the gradient takes the logits' memory, and is computed in the forward pass: `input` is overwritten. Needs
            reduction "mean" or "sum" and no `return_lse`. Under torch.compile it has no effect.

    Returns:
        The loss in fp32: a scalar, or (…) for reduction "none". Ignored rows have loss 0 and gradient 0; the mean over no
        valid row is NaN with gradient 0, as torch's.

    Raises:
        TypeError, ValueError: bad argument. IndexError: a target out of range (on the CPU; a device assert elsewhere).
        RuntimeError: the requested backend can't take the problem, or a second backward was asked of a fused backend.
    """
    validate.tensor("input", input)
    if input.dim() < 1:
        raise ValueError("input must have at least the class dimension, got a scalar")
    validate.same_dtype_and_device(input=input)
    vocab = input.shape[-1]
    _check_target(input.shape[:-1], target, vocab, ignore_index, input.device)
    if inplace and (reduction == "none" or return_lse):
        raise ValueError("inplace needs reduction 'mean' or 'sum' and no return_lse")
    logits = input.reshape(-1, vocab)
    if vocab > 1 and logits.stride(-1) != 1:
        logits = logits.contiguous()
    p = CrossEntropyProblem(
        logits, target.reshape(-1).contiguous(), *_options(weight, vocab, ignore_index, label_smoothing, z_loss,
                                                           softcap, reduction, input.device)
    )  # fmt: skip
    name = requested(backend)
    if name == "reference" or (name is None and input.dtype == torch.float64):
        loss, lse = reference.cross_entropy(p)
    elif inplace and not torch.compiler.is_compiling():
        if logits.data_ptr() != input.data_ptr():
            raise ValueError("inplace needs logits that can be viewed as (N, V) with last stride 1")
        return CrossEntropyInplaceFunction.apply(*p, _row_scale(p, reduction), name)
    else:
        loss, lse = CrossEntropyFunction.apply(*p, name)
    shape = input.shape[:-1]
    reduced = loss.view(shape) if reduction == "none" else loss.sum() * _row_scale(p, reduction).to(loss.dtype)
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
    """cross_entropy(input @ linear_weightᵀ + linear_bias, target) without the logits: rows go through in chunks.

    For "mean" and "sum" without `return_lse` the gradients are computed along with the loss, chunk by chunk: three matrix
    products, as without chunking. Otherwise the backward pass recomputes the logits. The weight's gradient accumulates in fp32.

    Args:
        input: (…, C); linear_weight: (V, C); linear_bias: (V,), all of one dtype (under autocast they are cast to its dtype).
        target: (…) int64, each `ignore_index` or in [0, V).
        workspace_bytes: at most this much memory holds logits at a time, as fp32 (but at least one row).
        The rest, the result and what is raised is as in `cross_entropy`. Argument names are torch 2.13's.
    """
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, linear_weight = input.to(dtype), linear_weight.to(dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(dtype)
    validate.tensor("linear_weight", linear_weight, 2)
    validate.tensor("input", input)
    vocab, channels = linear_weight.shape
    if input.dim() < 1 or input.shape[-1] != channels:
        raise ValueError(f"input {tuple(input.shape)} must end in linear_weight's {channels} columns")
    if linear_bias is not None and tuple(validate.tensor("linear_bias", linear_bias).shape) != (vocab,):
        raise ValueError(f"linear_bias must have shape ({vocab},), got {tuple(linear_bias.shape)}")
    validate.same_dtype_and_device(input=input, linear_weight=linear_weight, linear_bias=linear_bias)
    _check_target(input.shape[:-1], target, vocab, ignore_index, input.device)
    if workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes must be > 0, got {workspace_bytes}")
    x, shape = input.reshape(-1, channels), input.shape[:-1]
    options = _options(weight, vocab, ignore_index, label_smoothing, z_loss, softcap, reduction, input.device)
    p = chunked_loss.LinearCrossEntropyProblem(x, linear_weight, linear_bias, target.reshape(-1).contiguous(), *options)
    name = requested(backend)
    scale = None if reduction == "none" else _row_scale(p, reduction)
    if name == "reference" or (name is None and input.dtype == torch.float64):
        loss, lse = reference.linear_cross_entropy(
            x, linear_weight, p.target, linear_bias=linear_bias, **p.loss_options()
        )
    elif scale is not None and not return_lse and torch.is_grad_enabled() and _any_requires_grad(p):
        want_dx, want_dw = p.x.requires_grad, p.linear_weight.requires_grad or linear_bias is not None
        return LinearCrossEntropyScalarFunction.apply(*p, scale, want_dx, want_dw, workspace_bytes, name)[0]
    else:
        loss, lse = LinearCrossEntropyFunction.apply(*p, workspace_bytes, name)
    reduced = loss.view(shape) if scale is None else loss.sum() * scale.to(loss.dtype)
    return (reduced, lse.view(shape)) if return_lse else reduced


class CrossEntropyLoss(nn.Module):
    """`cross_entropy` as a module; arguments as there. Takes torch.nn.CrossEntropyLoss's place for logits (…, V)."""

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
        self.options = dict(
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            backend=backend,
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(input, target, self.weight, **self.options)


class LinearCrossEntropyLoss(nn.Module):
    """A linear layer (V, C) and `linear_cross_entropy` on it; keyword options as there."""

    def __init__(
        self, in_features: int, num_classes: int, *, bias: bool = False, device=None, dtype=None, **options
    ):
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.options = options

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(
            input, self.linear.weight, target, linear_bias=self.linear.bias, **self.options
        )


def _check_target(
    shape: torch.Size, target: Tensor, vocab: int, ignore_index: int, device: torch.device
) -> None:
    validate.tensor("target", target)
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64 class indices, got {target.dtype}")
    if target.shape != shape:
        raise ValueError(f"target must have shape {tuple(shape)}, got {tuple(target.shape)}")
    if target.device != device:
        raise ValueError(f"target is on {target.device} but input is on {device}; they must be the same")
    if target.device.type == "cpu" and target.numel() and not torch.compiler.is_compiling():
        bad = (target != ignore_index) & ((target < 0) | (target >= vocab))
        if bool(bad.any()):
            raise IndexError(f"target {int(target[bad][0])} is out of range for {vocab} classes")


def _options(weight, vocab, ignore_index, label_smoothing, z_loss, softcap, reduction, device) -> tuple:
    """The problem's fields after the target."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if weight is not None:
        validate.tensor("weight", weight, 1)
        if tuple(weight.shape) != (vocab,) or not weight.is_floating_point() or weight.device != device:
            raise ValueError(
                f"weight must be floating point of shape ({vocab},) on {device}, got {weight.dtype} "
                f"{tuple(weight.shape)} on {weight.device}"
            )
        weight = (weight if weight.dtype == torch.float64 else weight.float()).detach().contiguous()
    return (
        weight,
        ignore_index,
        validate.number("label_smoothing", label_smoothing, 0, 1),
        validate.number("z_loss", z_loss, 0),
        validate.number("softcap", softcap, 0),
    )


def _any_requires_grad(p: chunked_loss.LinearCrossEntropyProblem) -> bool:
    return any(t is not None and t.requires_grad for t in p[:3])


def _row_scale(p, reduction: str) -> Tensor:
    """() fp32: what each row's loss is multiplied by; inf for a mean over no valid row, which times its sum 0 is NaN."""
    if reduction == "sum":
        return torch.ones((), device=p.target.device)
    valid = p.target != p.ignore_index
    if p.weight is None:
        return 1.0 / valid.sum().float()
    return 1.0 / p.weight[p.target.where(valid, 0)].where(valid, 0.0).sum().float()


class CrossEntropyFunction(torch.autograd.Function):
    """(loss, lse) rows; the gradient is made from lse in the backward pass, in fresh memory."""

    @staticmethod
    def forward(*args):
        return torch.ops.fastattn.cross_entropy_fwd(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, weight, *options, ctx.backend = inputs
        ctx.options = options
        ctx.save_for_backward(logits, target, weight, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dloss, dlse):
        logits, target, weight, lse = ctx.saved_tensors
        if dloss is None:
            dloss = torch.zeros_like(lse)
        args = (logits, target, weight, *ctx.options, lse, dloss, dlse, ctx.backend)
        if torch.is_grad_enabled():
            dlogits = CrossEntropyBackward.apply(*args)
        else:
            dlogits = torch.ops.fastattn.cross_entropy_bwd(*args)
        return dlogits, *(None,) * 7


class CrossEntropyBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return torch.ops.fastattn.cross_entropy_bwd(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(NO_SECOND_BACKWARD)


class CrossEntropyInplaceFunction(torch.autograd.Function):
    """The reduced loss; the logits' memory holds its gradient from the forward pass on."""

    @staticmethod
    def forward(logits, target, weight, ignore_index, label_smoothing, z_loss, softcap, scale, backend):
        options = (ignore_index, label_smoothing, z_loss, softcap)
        loss, _ = torch.ops.fastattn.cross_entropy_fwd_bwd_(logits, target, weight, *options, scale, backend)
        return loss.sum() * scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, dloss):
        if torch.is_grad_enabled():
            raise RuntimeError("inplace cross_entropy can't be differentiated twice; leave inplace out")
        (gradient,) = ctx.saved_tensors
        if gradient.device.type != "cpu" or dloss.item() != 1.0:
            gradient.mul_(dloss)  # bumps the version: a second backward through this graph raises
        return gradient, *(None,) * 8


class LinearCrossEntropyFunction(torch.autograd.Function):
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
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND_BACKWARD)
        if dloss is None:
            dloss = torch.zeros_like(lse)
        dx, dw, dbias = torch.ops.fastattn.linear_cross_entropy_bwd(
            *tensors, *ctx.options, lse, dloss, dlse, ctx.workspace_bytes, ctx.backend
        )
        return dx, dw, dbias if tensors[2] is not None else None, *(None,) * 8


class LinearCrossEntropyScalarFunction(torch.autograd.Function):
    """The reduced loss and, computed along with it, the gradients that are wanted."""

    @staticmethod
    def forward(*args):
        return torch.ops.fastattn.linear_cross_entropy_fwd_bwd(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]  # x, linear_weight, linear_bias
        ctx.count = len(inputs)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dloss, *_):
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND_BACKWARD)
        if dloss is None:
            return (None,) * ctx.count
        # Out of place: the graph may be walked again. Nothing to do in the usual case of a loss that is the last node.
        unscaled = dloss.device.type == "cpu" and not torch.compiler.is_compiling() and dloss.item() == 1.0
        gradients = [
            None if dtype is None or g.numel() == 0 else (g if unscaled else g * dloss).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *gradients, *(None,) * (ctx.count - 3)


LinearCrossEntropyFunction.vmap = staticmethod(vmap_by_loop(LinearCrossEntropyFunction))
CrossEntropyFunction.vmap = staticmethod(vmap_by_loop(CrossEntropyFunction))
CrossEntropyBackward.vmap = staticmethod(vmap_by_loop(CrossEntropyBackward))
