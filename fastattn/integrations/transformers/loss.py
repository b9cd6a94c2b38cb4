"""`patch_loss`: a causal language model's own loss, through `linear_cross_entropy`.

transformers' forward calls the head, then `self.loss_function` on the logits. In a patched model,
when only the loss is wanted, the head hands on the hidden states as they are and the loss function
multiplies them by the head's weight, chunk by chunk. All else in between, such as auxiliary losses
of experts, is the model's own code. That nothing was done to the logits on their way is checked
each time: the loss must be given the very tensor that the head was. Or that tensor scaled by a
number of the configuration: the model then scales the hidden states in place of the logits, which
gives the same logits, and the same gradients.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ... import cross_entropy, linear_cross_entropy

_SOFTCAP = "final_logit_softcapping"  # in the configurations of Gemma 2 and those after it
# What forward does to its logits with a number of the configuration: Granite's, Cohere's.
_SCALINGS = {"logits_scaling": operator.truediv, "logit_scale": operator.mul}
_SOMETHING_ELSE = (
    f"it does something to its logits between head and loss that is neither {_SOFTCAP} nor"
    f" {' nor '.join(_SCALINGS)}; unpatch_loss(model), or logits=True"
)


def patch_loss(
    model: PreTrainedModel,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logits: bool | None = None,
    backend: str | None = None,
) -> None:
    """Puts fastattn's losses under a causal language model, in place.

    With `labels` and no logits wanted, the loss is `linear_cross_entropy` of the hidden states and
    the head, and the output's `logits` are None; otherwise it is `cross_entropy` of the logits.
    Without `labels` nothing changes.

    Args:
        model: its head is a plain Linear, with or without bias, tied or not; its loss is
            transformers' for causal language models; it may scale or softcap its logits, and
            changes them in no other way. `ignore_index`, `shift_labels` and `num_items_in_batch`,
            which Trainer gives for gradient accumulation, work as before.
        label_smoothing, z_loss, backend: as in `linear_cross_entropy`. (Trainer's own
            label_smoothing_factor keeps the labels from the model, hence takes whole logits.)
        logits: whether they are wanted along with the loss. None: in evaluation, for metrics, but
            not in training.

    Raises:
        TypeError: not a model of transformers.
        ValueError: the model's head, loss or hooks leave no room for this; it is named, with the
            reason. What a model does to its logits shows in its first forward pass with labels,
            which raises RuntimeError.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel, got {type(model).__name__}")
    unpatch_loss(model)
    head = model.get_output_embeddings()
    if (reason := _unfit(model, head)) is not None:
        raise ValueError(f"patch_loss can't take {type(model).__name__}: {reason}")
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "backend": backend}
    head.__class__ = _Head
    head.skipped, head.given = False, None
    model.loss_function = _Loss(type(model).__name__, head, options, logits)
    original: Any = type(model)
    model.__class__ = _patched(original)


def unpatch_loss(model: PreTrainedModel) -> None:
    """Undoes `patch_loss`. A model that isn't patched stays as it is."""
    if (original := getattr(type(model), "_fastattn_unpatched", None)) is None:
        return
    head = model.get_output_embeddings()
    head.__class__ = nn.Linear
    del head.skipped, head.given
    if isinstance(model._loss_function, _Loss):
        del model._loss_function
    model.__class__ = original


def _unfit(model: PreTrainedModel, head: nn.Module | None) -> str | None:
    """Why the model can't be patched, or None."""
    if type(head) is not nn.Linear:
        what = "nothing" if head is None else f"a {type(head).__name__}"
        return f"its head is {what}, not a torch.nn.Linear"
    if "forward" in vars(model) or "forward" in vars(head):
        return "hooks stand in for the forward of it or its head: patch it before they are set"
    if model.loss_function is not ForCausalLMLoss:
        return "its loss function is not transformers' ForCausalLMLoss"
    if "loss_function" not in inspect.unwrap(type(model).forward).__code__.co_names:
        return "its forward computes the loss itself"
    return None


class _Head(nn.Linear):
    """A head that hands on what it is given while `skipped`."""

    skipped: bool
    given: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        if not self.skipped:
            return super().forward(input)
        self.given = input
        return input


class _Loss:
    """What transformers calls in place of ForCausalLMLoss, with its signature."""

    def __init__(self, name: str, head: _Head, options: dict[str, Any], logits: bool | None):
        self.name, self.head, self.options, self.logits = name, head, options, logits
        self.config: Any = None  # of the model whose head is skipped
        self.softcap = 0.0
        self.scaling: str | None = None  # of _SCALINGS, once it has been seen to be what is done
        self.called = False

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        self.called = True
        if shift_labels is None:  # so that tokens < n predict n
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        options = {**self.options, "ignore_index": ignore_index}
        options["reduction"] = "mean" if num_items_in_batch is None else "sum"
        target = shift_labels.to(logits.device)
        if not self.head.skipped:
            loss = cross_entropy(logits, target, **options)
        else:
            weight = self.head.weight
            bias: Tensor | None = self.head.bias
            if logits is not self.head.given:
                bias = self._scaled_bias(logits)
            options["softcap"] = self.softcap
            loss = linear_cross_entropy(logits, weight, target, linear_bias=bias, **options)
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss if num_items_in_batch is None else loss / num_items_in_batch

    def _scaled_bias(self, hidden: Tensor) -> Tensor | None:
        """The head's bias, if it has one, scaled as the hidden states have been."""
        scaling = self.scaling or self._find_scaling(hidden)
        if scaling is None:
            raise RuntimeError(f"patch_loss can't take {self.name}: {_SOMETHING_ELSE}")
        scale, number = _SCALINGS[scaling], getattr(self.config, scaling)
        return None if self.head.bias is None else scale(self.head.bias, number)

    def _find_scaling(self, hidden: Tensor) -> str | None:
        """Which of _SCALINGS makes these of what the head was given, and nothing else does.

        That is looked at once, since it waits for the device. Compiled code, which can't branch on
        it, has it asserted by the device, each time.
        """
        if self.softcap > 0:
            return None
        for name, scale in _SCALINGS.items():
            if (number := getattr(self.config, name, None)) is None:
                continue
            scaled = scale(self.head.given, number)
            if torch.compiler.is_compiling():
                message = f"patch_loss can't take {self.name}: {_SOMETHING_ELSE}"
                torch._assert_async((hidden == scaled).all(), message)
                return name
            if torch.equal(hidden, scaled):
                self.scaling = name
                return name
        return None

    @contextlib.contextmanager
    def without_logits(self, config: Any) -> Iterator[None]:
        """The head is skipped, and so is what Gemma's forward would do to its result."""
        softcap = getattr(config, _SOFTCAP, None)
        if softcap is not None:
            object.__setattr__(config, _SOFTCAP, None)  # past validation: Gemma 3n wants a float
        self.softcap, self.head.skipped, self.called = softcap or 0.0, True, False
        self.config = config
        try:
            yield
        finally:
            self.softcap, self.head.skipped, self.head.given = 0.0, False, None
            if softcap is not None:
                object.__setattr__(config, _SOFTCAP, softcap)


@functools.cache
def _patched(cls: Any) -> Any:
    """The class with a forward that knows when logits aren't wanted; by the same name."""
    names = tuple(inspect.signature(cls.forward).parameters)[1:]

    class Patched(cls):
        _fastattn_unpatched = cls

        @functools.wraps(cls.forward)
        def forward(self, *args, **kwargs):
            kwargs.update(zip(names, args, strict=False))
            return _forward(self, super().forward, kwargs)

    Patched.__name__, Patched.__qualname__ = cls.__name__, cls.__qualname__
    Patched.__module__ = cls.__module__
    return Patched


def _forward(model: PreTrainedModel, forward: Callable, kwargs: dict[str, Any]) -> Any:
    loss = model._loss_function
    if not isinstance(loss, _Loss):  # somebody has set another since: it gets what it would have
        return forward(**kwargs)
    wanted = not model.training if loss.logits is None else loss.logits
    if kwargs.get("labels") is None or wanted:
        return forward(**kwargs)
    as_dict = kwargs.pop("return_dict", None)
    with loss.without_logits(model.config):
        output = forward(**kwargs, return_dict=True)
    if not loss.called:
        raise RuntimeError(f"{type(model).__name__} has labels but computes no loss of its logits")
    output = type(output)(**{k: v for k, v in output.items() if k != "logits"})
    if as_dict is None:
        as_dict = getattr(model.config, "return_dict", True)
    return output if as_dict else output.to_tuple()
