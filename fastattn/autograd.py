"""What the package's autograd.Functions share: a vmap rule, and gradients that have no gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NO_SECOND_BACKWARD = (
    "fastattn's fused kernels have no second backward;"
    " backend='reference' computes one (it is plain PyTorch)"
)


def wants_gradient(*args: object) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


class FusedFunction(torch.autograd.Function):
    """Base of Functions around raw operators. Call them by `run`."""

    @classmethod
    def run(cls, *args):
        """`apply`, or plain `forward` where that is enough.

        Without a gradient wanted, `apply` costs more than a small kernel (0.1 ms), and Dynamo (in
        torch 2.13) would hand its context to a forward of *args.
        """
        compiling = torch.compiler.is_compiling()
        if not wants_gradient(*args) and (compiling or not transformed()):
            return cls.forward(*args)
        return cls.apply(*(_unalias(args) if compiling else args))

    @classmethod
    def vmap(cls, info, in_dims, *args):
        """Once for each element of the mapped dimension."""
        if info.batch_size == 0:
            raise ValueError("fastattn's kernels can't be mapped over a dimension of size 0")
        results = []
        for i in range(info.batch_size):
            picked = (
                a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)
            )
            results.append(cls.apply(*picked))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        outputs = tuple(torch.stack(column) for column in zip(*results, strict=True))
        return outputs, (0,) * len(outputs)


def transformed() -> bool:
    """Inside vmap or another transform of torch.func, whose rules `apply` looks up."""
    return torch._C._are_functorch_transforms_active()


def _unalias(args: tuple) -> tuple:
    """Each tensor that came before, as a view of itself: Dynamo refuses one that comes twice."""
    distinct: list[Tensor] = []
    for a in args:
        again = isinstance(a, Tensor) and any(a is t for t in distinct)
        distinct.append(a.view_as(a) if again else a)
    return tuple(distinct)


def gradient_function(compute: Callable) -> type[FusedFunction]:
    """`compute(*args)`, which makes gradients, as a Function whose own backward raises.

    Backward passes call this and not the bare operator, which vmap knows nothing of and which
    would cut the graph in silence under create_graph=True.
    """

    class Gradient(FusedFunction):
        @staticmethod
        def forward(*args):
            return compute(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *grads):
            raise RuntimeError(NO_SECOND_BACKWARD)

    return Gradient


def scalar_loss_function(compute: Callable, leaves: int) -> type[FusedFunction]:
    """`compute(*args)` → (loss, *gradients) as a Function of the first `leaves` arguments.

    The loss is a scalar; the gradients, one for each leaf, are computed along with it. The first
    backward pass hands them over. A later one, through a retained graph, computes them anew: the
    first ones belong to whoever got them.
    """

    class ScalarLoss(FusedFunction):
        @staticmethod
        def forward(*args):
            return compute(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.mark_non_differentiable(*output[1:])
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in inputs))
            ctx.plain = [None if isinstance(a, Tensor) else a for a in inputs]
            ctx.gradients = output[1:]

        @staticmethod
        def backward(ctx, dloss, *_):
            if dloss is None:
                return (None,) * len(ctx.plain)
            tensors, gradients, ctx.gradients = ctx.saved_tensors, ctx.gradients, None
            if gradients is None:
                args = (b if a is None else a for a, b in zip(tensors, ctx.plain, strict=True))
                gradients = compute(*args)[1:]
            scaled = _scale(dloss, tensors[:leaves], gradients)
            wanted = zip(scaled, ctx.needs_input_grad, strict=False)
            return *(g if w else None for g, w in wanted), *(None,) * (len(tensors) - leaves)

    return ScalarLoss


def _scale(dloss: Tensor, leaves: tuple, gradients: tuple) -> tuple:
    """Gradients of a loss that are no one else's, times the loss's own, in the leaves' dtypes."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed():
        gradients = Scaled.run(dloss, *leaves, *gradients)
    elif dloss.device.type != "cpu" or dloss.item() != 1:  # elsewhere item() would wait
        gradients = tuple(g.mul_(dloss) for g in gradients)
    return tuple(
        g if leaf is None else g.to(leaf.dtype) for g, leaf in zip(gradients, leaves, strict=True)
    )


# Of the loss's gradient and, for the sake of a second backward, which must raise, the leaves too.
Scaled = gradient_function(lambda dloss, *rest: tuple(g * dloss for g in rest[len(rest) // 2 :]))
