"""Cross-entropy on logits, and fused with the last linear layer: cases, exact results, peers.

Peers compute the mean over all rows. "fwd+bwd" is timed whole, since many kernels make the gradient
along with the loss; "in place" lets it overwrite the logits, which are restored untimed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn

from .attention_packages import HALVES
from .case import Call, Case, Inputs, Peer, Streaming, our_peers, randn

VOCAB = 50257  # GPT-2's
ROWS_AT_A_TIME = 256  # of the exact result
SAMPLE = 16  # rows and classes whose gradients are checked

Passes = Literal["fwd", "fwd+bwd", "fwd+bwd in place"]


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Case):
    rows: int
    vocab: int = VOCAB
    passes: Passes = "fwd+bwd"

    @property
    def name(self) -> str:
        return f"N{self.rows} V{self.vocab} {self.passes}"

    @property
    def features(self) -> frozenset[str]:
        return frozenset({"in place"} if "in place" in self.passes else ())

    @property
    def moved_bytes(self) -> float:
        """One read of the logits, and one write of their gradient."""
        return (1 if self.passes == "fwd" else 2) * self.rows * self.vocab * self.dtype.itemsize

    @property
    def streaming(self) -> Streaming:
        ways: dict[str, Streaming] = {"fwd": "read", "fwd+bwd": "copied"}
        return ways.get(self.passes, "rewritten")

    def inputs(self, device: torch.device) -> Inputs:
        g = self.generator(device)
        logits = randn(g, self.rows, self.vocab, dtype=self.dtype)
        target = torch.randint(self.vocab, (self.rows,), generator=g, device=device)
        return {"logits": logits, "target": target}

    def parts(self, name: str, result: Tensor) -> Tensor:
        return result if name == "loss" else result[:SAMPLE]

    def exact(self, inputs: Inputs) -> dict[str, Tensor]:
        logits, target = inputs["logits"], inputs["target"]
        loss, _ = exact_loss(lambda rows: logits[rows].double(), target)
        dlogits = exact_dlogits(logits[:SAMPLE].double(), target[:SAMPLE], self.rows)
        return {"loss": loss} | ({} if self.passes == "fwd" else {"dlogits": dlogits})


@dataclass(frozen=True, kw_only=True)
class LinearCrossEntropy(Case):
    rows: int
    channels: int
    vocab: int = VOCAB

    @property
    def name(self) -> str:
        return f"N{self.rows} C{self.channels} V{self.vocab} fwd+bwd"

    @property
    def flops(self) -> float:
        """Three products: the logits, dX and dW."""
        return 6.0 * self.rows * self.channels * self.vocab

    @property
    def moved_bytes(self) -> float:
        """x, the weight, and both gradients."""
        return 2 * (self.rows + self.vocab) * self.channels * self.dtype.itemsize

    def inputs(self, device: torch.device) -> Inputs:
        g, shape = self.generator(device), (self.vocab, self.channels)
        x = randn(g, self.rows, self.channels, dtype=self.dtype)
        weight = randn(g, *shape, dtype=self.dtype, scale=self.channels**-0.5)
        target = torch.randint(self.vocab, (self.rows,), generator=g, device=device)
        return {"x": x, "weight": weight, "target": target}

    def parts(self, name: str, result: Tensor) -> Tensor:
        return result if name == "loss" else result[:SAMPLE]

    def exact(self, inputs: Inputs) -> dict[str, Tensor]:
        x, weight, target = inputs["x"].double(), inputs["weight"].double(), inputs["target"]
        loss, lse = exact_loss(lambda rows: x[rows] @ weight.mT, target)
        dlogits = exact_dlogits(x[:SAMPLE] @ weight.mT, target[:SAMPLE], self.rows)
        share = torch.exp(x @ weight[:SAMPLE].mT - lse[:, None])  # (N, SAMPLE), of those classes
        hit = target[:, None] == torch.arange(SAMPLE, device=target.device)
        dweight = ((share - hit.double()) / self.rows).mT @ x
        return {"loss": loss, "dx": dlogits @ weight, "dweight": dweight}


def exact_loss(logits: Callable[[slice], Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss and each row's log-sum-exp in fp64, from fp64 logits of a few rows a time."""
    losses, lses = [], []
    for start in range(0, target.numel(), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        z = logits(rows)
        lses.append(torch.logsumexp(z, -1))
        losses.append(lses[-1] - z.gather(1, target[rows, None])[:, 0])
    return torch.cat(losses).mean(), torch.cat(lses)


def exact_dlogits(z: Tensor, target: Tensor, rows: int) -> Tensor:
    return (torch.softmax(z, -1) - F.one_hot(target, z.shape[-1])) / rows


# ---- peers -------------------------------------------------------------------------------------

LossFunction = Callable[..., Tensor]  # (logits, target) or (x, weight, target) → the mean loss


def loss_call(case: Case, inputs: Inputs, function: LossFunction) -> Call:
    target = inputs["target"]
    names = ("logits",) if isinstance(case, CrossEntropy) else ("x", "weight")
    if isinstance(case, CrossEntropy) and case.passes == "fwd":
        forward = torch.no_grad()(lambda: function(inputs["logits"], target))
        return Call(forward, lambda loss: {"loss": loss})
    in_place = "in place" in case.features
    kept = [inputs[name] for name in names]
    leaves = [(x.clone() if in_place else x.detach()).requires_grad_() for x in kept]

    def release() -> None:
        for x in leaves:
            x.grad = None

    def before() -> None:
        release()
        if in_place:
            for x, value in zip(leaves, kept, strict=True):
                x.data.copy_(value)

    def run() -> Tensor:
        loss = function(*leaves, target)
        loss.backward()
        return loss

    def results(loss: Tensor) -> dict[str, Tensor]:
        return {"loss": loss} | {f"d{n}": x.grad for n, x in zip(names, leaves, strict=True)}

    return Call(run, results, before, release)


def our_cross_entropy(backend: str) -> Callable[[Case, Inputs], Call]:
    def prepare(case: Case, inputs: Inputs) -> Call:
        options = {"backend": backend, "inplace": "in place" in case.features}
        return loss_call(case, inputs, lambda z, t: fastattn.cross_entropy(z, t, **options))

    return prepare


def our_linear_cross_entropy(backend: str) -> Callable[[Case, Inputs], Call]:
    def run(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return fastattn.linear_cross_entropy(x, weight, target, backend=backend)

    return lambda case, inputs: loss_call(case, inputs, run)


def simply(find: Callable[[], LossFunction], **options: Any) -> Callable[[Case, Inputs], Call]:
    """A peer that is one function; `find` imports it."""

    def prepare(case: Case, inputs: Inputs) -> Call:
        function = find()
        return loss_call(case, inputs, lambda *args: function(*args, **options))

    return prepare


def textbook(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


def liger(name: str) -> Callable[[], LossFunction]:
    def find() -> LossFunction:
        from liger_kernel.transformers import functional

        return getattr(functional, name)

    return find


def cut_cross_entropy() -> LossFunction:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def quack(name: str) -> Callable[[], LossFunction]:
    def find() -> LossFunction:
        if name == "cross_entropy":
            from quack.cross_entropy import cross_entropy

            return cross_entropy
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return chunked_linear_cross_entropy

    return find


def torch_linear(chunked: bool) -> Callable[[], LossFunction]:
    def find() -> LossFunction:
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None
        return lambda *args: F.linear_cross_entropy(*args, options=options)

    return find


def before_torch_2_13(case: Case) -> str | None:
    return None if hasattr(F, "linear_cross_entropy") else "torch has it from 2.13 on"


def always_in_place(case: Case) -> str | None:
    assert isinstance(case, CrossEntropy)
    return "its gradient is always in place" if case.passes == "fwd+bwd" else None


LOGITS, LINEAR = frozenset({"cross-entropy"}), frozenset({"linear-cross-entropy"})
IN_PLACE = frozenset({"in place"})
GPU = {"devices": ("cuda",)}
GPU_HALVES = {"devices": ("cuda",), "dtypes": HALVES}
PEERS = [
    *our_peers(LOGITS, our_cross_entropy, IN_PLACE),
    Peer(
        name="torch",
        suites=LOGITS,
        prepare=simply(lambda: F.cross_entropy),
        features=IN_PLACE,  # it just leaves the logits alone
    ),
    Peer(
        name="torch.compile",
        suites=LOGITS,
        prepare=simply(lambda: torch.compile(F.cross_entropy, dynamic=False)),
        features=IN_PLACE,
        compiles=True,
    ),
    Peer(
        name="Liger",
        module="liger_kernel.transformers.functional",
        suites=LOGITS,
        prepare=simply(liger("liger_cross_entropy")),
        features=IN_PLACE,
        unfit=always_in_place,
        **GPU,
    ),
    Peer(
        name="quack",
        module="quack",
        suites=LOGITS,
        prepare=simply(quack("cross_entropy"), reduction="mean", inplace_backward=False),
        compiles=True,
        **GPU,
    ),
    *our_peers(LINEAR, our_linear_cross_entropy, frozenset()),
    Peer(name="torch", suites=LINEAR, prepare=simply(lambda: textbook)),
    Peer(
        name="torch.compile",
        suites=LINEAR,
        prepare=simply(lambda: torch.compile(textbook, dynamic=False)),
        compiles=True,
    ),
    Peer(
        name="F.linear_cross_entropy",
        suites=LINEAR,
        prepare=simply(torch_linear(chunked=False)),
        unfit=before_torch_2_13,
    ),
    Peer(
        name="F.linear_cross_entropy, chunked",
        suites=LINEAR,
        prepare=simply(torch_linear(chunked=True)),
        unfit=before_torch_2_13,
    ),
    Peer(
        name="Liger",
        module="liger_kernel.transformers.functional",
        suites=LINEAR,
        prepare=simply(liger("liger_fused_linear_cross_entropy")),
        **GPU,
    ),
    Peer(
        name="cut-cross-entropy",
        module="cut_cross_entropy",
        suites=LINEAR,
        prepare=simply(cut_cross_entropy),
        **GPU_HALVES,
    ),
    Peer(
        name="quack",
        module="quack",
        suites=LINEAR,
        prepare=simply(quack("chunked_linear_cross_entropy"), reduction="mean"),
        compiles=True,
        **GPU_HALVES,
    ),
]
