"""A training step: forward, backward, clipping at norm 1 and fused AdamW, from equal weights.

fp32 on the CPU; on GPUs bf16 autocast over fp32 weights. Model FLOPs are 6 N + 12 · L · C · T a
token (PaLM's and nanoGPT's convention, attention counted whole): over time and the device's peak
they are the MFU. Peak memory is beyond weights and AdamW's state, and has the gradients in it.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastattn.gpt import GPT, GPTConfig
from fastattn.optim import adamw

from .case import Call, Case, Inputs, Peer, our_peers
from .plain_gpt import PlainGPT

SUITE = frozenset({"train-step"})
FORMULA = "6 N + 12 L C T a token"


@dataclass(frozen=True, kw_only=True)
class TrainStep(Case):
    label: str
    model: GPTConfig
    batch: int

    baseline = "nanoGPT-style"
    cold = False

    @property
    def name(self) -> str:
        return f"{self.label}, B{self.batch} T{self.seqlen}, AdamW"

    @property
    def seqlen(self) -> int:
        return self.model.block_size

    @property
    def tokens(self) -> int:
        return self.batch * self.seqlen

    @property
    def flops(self) -> float:
        with torch.device("meta"):
            return float(GPT(self.model).flops_per_token(self.seqlen) * self.tokens)

    def inputs(self, device: torch.device) -> Inputs:
        generator, shape = self.generator(device), (self.batch, self.seqlen + 1)
        torch.manual_seed(0)
        model = GPT(self.model)
        idx = torch.randint(self.model.vocab_size, shape, generator=generator, device=device)
        return {"state": model.state_dict(), "idx": idx[:, :-1], "targets": idx[:, 1:]}

    def parts(self, name: str, result: Tensor) -> Tensor:
        return result

    def exact(self, inputs: Inputs) -> dict[str, Tensor]:
        """The first loss, and the norm of its gradient, in fp64, a sequence at a time."""
        device = inputs["idx"].device
        model = PlainGPT(self.model)
        model.load_state_dict(inputs["state"])
        model.to(device, torch.float64)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for idx, targets in zip(inputs["idx"].split(1), inputs["targets"].split(1), strict=True):
            part = model(idx, targets) / self.batch
            part.backward()
            loss += part.detach()
        return {
            "loss": loss,
            "grad_norm": nn.utils.get_total_norm(p.grad for p in model.parameters()),
        }


LossFunction = Callable[[Tensor, Tensor], Tensor]  # (idx, targets) → the mean loss


def step_call(case: Case, inputs: Inputs, model: nn.Module, loss_of: LossFunction) -> Call:
    idx, targets = inputs["idx"], inputs["targets"].contiguous()
    optimizer = adamw(model, lr=1e-4)
    autocast: Callable = contextlib.nullcontext
    if case.dtype != torch.float32:
        autocast = lambda: torch.autocast(idx.device.type, case.dtype)  # noqa: E731

    def run() -> tuple[Tensor, Tensor]:
        with autocast():
            loss = loss_of(idx, targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), norm

    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    return Call(
        run,
        lambda pair: {"loss": pair[0], "grad_norm": pair[1]},
        facts={"gradient_bytes": gradients},
    )


def ours(backend: str) -> Callable[[Case, Inputs], Call]:
    def prepare(case: Case, inputs: Inputs) -> Call:
        assert isinstance(case, TrainStep)
        model = loaded(GPT(case.model), inputs)
        return step_call(case, inputs, model, lambda i, t: model(i, t, backend=backend))

    return prepare


def ours_compiled(backend: str) -> Callable[[Case, Inputs], Call]:
    def prepare(case: Case, inputs: Inputs) -> Call:
        assert isinstance(case, TrainStep)
        model = loaded(GPT(case.model), inputs)
        compiled = torch.compile(model, dynamic=False)
        return step_call(case, inputs, model, lambda i, t: compiled(i, t, backend=backend))

    return prepare


def loaded(model: nn.Module, inputs: Inputs) -> nn.Module:
    model.load_state_dict(inputs["state"])
    return model.to(inputs["idx"].device)


def plain(compiled: bool) -> Callable[[Case, Inputs], Call]:
    def prepare(case: Case, inputs: Inputs) -> Call:
        assert isinstance(case, TrainStep)
        model = loaded(PlainGPT(case.model), inputs)
        forward = torch.compile(model, dynamic=False) if compiled else model
        return step_call(case, inputs, model, forward)

    return prepare


def plain_by(kernel: SDPBackend) -> Callable[[Case, Inputs], Call]:
    """Compiled, with a kernel of SDPA's that not every torch prefers by itself.

    Chosen inside what is compiled: outside, Dynamo would take the graph that it has of another
    model of this class, which was traced without.
    """

    def prepare(case: Case, inputs: Inputs) -> Call:
        assert isinstance(case, TrainStep)
        model = loaded(PlainGPT(case.model), inputs)

        def loss_of(idx: Tensor, targets: Tensor) -> Tensor:
            with sdpa_kernel(kernel):
                return model(idx, targets)

        return step_call(case, inputs, model, torch.compile(loss_of, dynamic=False))

    return prepare


def transformers(case: Case, inputs: Inputs) -> Call:
    from transformers import GPT2LMHeadModel
    from transformers.utils.logging import disable_progress_bar

    assert isinstance(case, TrainStep)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        loaded(GPT(case.model), inputs).save_pretrained(folder)
        model = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="sdpa")
    model = model.to(inputs["idx"].device).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def loss_of(idx: Tensor, targets: Tensor) -> Tensor:
        logits = model(idx, use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return step_call(case, inputs, model, loss_of)


PEERS = [
    *our_peers(SUITE, ours, frozenset()),
    *(
        Peer(
            name=f"{peer.name}, compiled",
            suites=SUITE,
            prepare=ours_compiled(peer.backend),
            devices=peer.devices,
            backend=peer.backend,
            unfit=peer.unfit,
            compiles=True,
        )
        for peer in our_peers(SUITE, ours, frozenset())
        if peer.ours and peer.backend is not None
    ),
    Peer(name="nanoGPT-style", suites=SUITE, prepare=plain(compiled=False)),
    Peer(name="nanoGPT-style, compiled", suites=SUITE, prepare=plain(compiled=True), compiles=True),
    Peer(
        name="nanoGPT-style, compiled, cuDNN",
        suites=SUITE,
        prepare=plain_by(SDPBackend.CUDNN_ATTENTION),
        devices=("cuda",),
        compiles=True,
    ),
    Peer(name="transformers", suites=SUITE, prepare=transformers, module="transformers"),
]
