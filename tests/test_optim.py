"""Optimizers: groups that cover the model, updates against formulas, exact state, schedules."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fastattn.gpt import GPT, GPTConfig
from fastattn.optim import (
    Muon,
    adamw,
    clip_grad_norm,
    group_parameters,
    muon,
    orthogonalize,
    set_lr,
    warmup_cosine,
    warmup_stable_decay,
)

CONFIG = GPTConfig(vocab_size=31, block_size=8, n_layer=2, n_head=2, n_embd=16)
MAKERS = {"adamw": adamw, "muon": muon}


def tiny(seed: int = 0, **changes) -> GPT:
    torch.manual_seed(seed)
    config = GPTConfig(**{**CONFIG.to_dict(), **changes})
    return GPT(config)


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- groups ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("modern", [True, False])
def test_groups_of_a_gpt(tie: bool, modern: bool):
    changes = {"norm": "rmsnorm", "mlp": "swiglu", "position": "rope"} if modern else {}
    model = tiny(tie_embeddings=tie, **changes)
    groups = group_parameters(model)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {names[id(p)] for p in groups.matrices}
    linears = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert matrices == {f"h.{i}.{name}.weight" for i in range(2) for name in linears}
    tables = {names[id(p)] for p in groups.embeddings}
    assert tables == {"wte.weight"} | (set() if tie else {"lm_head.weight"}) | (
        set() if modern else {"wpe.weight"}
    )
    assert all(p.ndim == 1 for p in groups.vectors)
    assert sum(map(len, groups)) == len(list(model.parameters()))


def test_frozen_and_tied_parameters():
    model = nn.ModuleDict(
        {"wte": nn.Embedding(5, 4), "lm_head": nn.Linear(4, 5), "c": nn.Linear(4, 4)}
    )
    model["lm_head"].weight = model["wte"].weight
    model["c"].bias.requires_grad_(False)
    model["kernel"] = nn.Conv1d(2, 2, 3)  # three dimensions
    groups = group_parameters(model)
    assert [tuple(p.shape) for p in groups.matrices] == [(4, 4)]
    assert [tuple(p.shape) for p in groups.embeddings] == [(5, 4), (2, 2, 3)]
    assert [tuple(p.shape) for p in groups.vectors] == [(5,), (2,)]


def test_only_matrices_and_tables_are_decayed():
    for make in (adamw, muon):
        model = tiny()
        optimizer = make(model, weight_decay=0.5)
        for group in optimizer.param_groups:
            assert all((p.ndim > 1) == (group["weight_decay"] == 0.5) for p in group["params"])
        before = weights(model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for parameter, old in zip(model.parameters(), before, strict=True):
            if parameter.ndim > 1:
                assert parameter.abs().sum() < old.abs().sum()
            else:
                assert torch.equal(parameter, old)


# ---- updates -----------------------------------------------------------------------------------


def test_adamw_follows_its_formula():
    model = tiny().double()
    optimizer = adamw(model, lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    expected, m, v = weights(model), [0.0] * 99, [0.0] * 99
    for step in range(1, 6):
        give_gradients(model, step)
        for i, parameter in enumerate(model.parameters()):
            g = parameter.grad
            m[i] = 0.8 * m[i] + 0.2 * g
            v[i] = 0.9 * v[i] + 0.1 * g * g
            m_hat, v_hat = m[i] / (1 - 0.8**step), v[i] / (1 - 0.9**step)
            decay = 0.3 if parameter.ndim > 1 else 0.0
            expected[i] = expected[i] * (1 - 0.01 * decay) - 0.01 * m_hat / (v_hat.sqrt() + 1e-6)
        optimizer.step()
    torch.testing.assert_close(weights(model), expected, rtol=1e-10, atol=1e-12)


def test_muon_follows_its_formula():
    model = tiny()
    optimizer = muon(model, lr=0.1, momentum=0.9, weight_decay=0.2)
    groups = group_parameters(model)
    expected = [p.detach().clone() for p in groups.matrices]
    momenta = [torch.zeros_like(p) for p in groups.matrices]
    for step in range(3):
        give_gradients(model, step)
        for i, parameter in enumerate(groups.matrices):
            momenta[i] = 0.9 * momenta[i] + 0.1 * parameter.grad
            nesterov = 0.1 * parameter.grad + 0.9 * momenta[i]
            scale = max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
            update = newton_schulz(nesterov)
            expected[i] = expected[i] * (1 - 0.1 * 0.2) - 0.1 * scale * update
        optimizer.step()
    got = [p.detach() for p in groups.matrices]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_muon_gives_the_rest_to_adamw():
    model, other = tiny(), tiny()
    both, alone = muon(model, adamw_lr=0.01, weight_decay=0.1), adamw(other, lr=0.01)
    for step in range(3):
        give_gradients(model, step)
        give_gradients(other, step)
        both.step()
        alone.step()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        if a.ndim < 2 or name in ("wte.weight", "wpe.weight"):
            assert torch.equal(a, b), name
        else:
            assert not torch.equal(a, b), name


def test_muon_is_near_torchs_own():
    weight, gradient = torch.randn(24, 8), torch.randn(24, 8)
    ours, theirs = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    ours.grad, theirs.grad = gradient.clone(), gradient.clone()
    Muon([{"params": [ours], "lr": 0.1}]).step()
    torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0).step()  # in bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.1 * 3**0.5 * 2**-6)


def newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    """The iteration as published, in float64."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.to(matrix.dtype)


@pytest.mark.parametrize(
    "shape", [(8, 8), (8, 12), (8, 16), (16, 64), (64, 16), (48, 16), (1, 5), (5, 1)]
)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_orthogonalize_is_newton_schulz(shape: tuple[int, int], steps: int):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-4
    torch.testing.assert_close(
        orthogonalize(matrix, steps), newton_schulz(matrix, steps), rtol=1e-4, atol=2e-5
    )


@pytest.mark.parametrize("shape", [(32, 32), (32, 128), (128, 32)])
def test_orthogonalize_equalizes_singular_values(shape: tuple[int, int]):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    spread = torch.logspace(0, -1.5, 32)  # largest 30 times the smallest
    result = orthogonalize((u * spread) @ v)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6 and values.max() < 1.3
    rotated = u.mT @ result @ v.mT  # the singular directions stay
    assert (rotated - rotated.diagonal().diag()).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(16, 16), (16, 64)])
def test_orthogonalize_hard_cases(shape: tuple[int, int]):
    assert torch.equal(orthogonalize(torch.zeros(shape)), torch.zeros(shape))
    low_rank = torch.ones(shape)
    values = torch.linalg.svdvals(orthogonalize(low_rank))
    assert 0.6 < values[0] < 1.3 and values[1] < 1e-2
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    ill = (u * torch.logspace(0, -8, 16)) @ v
    assert torch.linalg.svdvals(orthogonalize(ill)).max() < 1.3
    assert torch.isnan(orthogonalize(torch.full(shape, math.nan))).all()


@pytest.mark.parametrize("name", MAKERS)
def test_a_gpt_learns(name: str):
    model = tiny()
    rates = {"adamw": {"lr": 0.01}, "muon": {"lr": 0.05, "adamw_lr": 0.01}}
    optimizer = MAKERS[name](model, **rates[name])
    tokens = torch.randint(31, (4, 9), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:], backend="reference")
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3.3 and losses[-1] < 0.5


# ---- state -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_state_round_trip_is_exact(name: str):
    model = tiny()
    optimizer = MAKERS[name](model)
    for step in range(3):
        give_gradients(model, step)
        set_lr(optimizer, 0.5**step)
        optimizer.step()
    copied = copy.deepcopy(model)
    resumed = MAKERS[name](copied, lr=1.0)  # replaced by the loaded one
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        for m, o in ((model, optimizer), (copied, resumed)):
            give_gradients(m, step)
            set_lr(o, 0.5**step)
            o.step()
    assert_same_bits(weights(model), weights(copied))


@pytest.mark.parametrize("name", MAKERS)
def test_deterministic(name: str):
    results = []
    for _ in range(2):
        model = tiny()
        optimizer = MAKERS[name](model)
        for step in range(3):
            give_gradients(model, step)
            optimizer.step()
        results.append(weights(model))
    assert_same_bits(*results)


@pytest.mark.parametrize("name", MAKERS)
def test_parameters_without_gradient_stay(name: str):
    model = tiny()
    optimizer = MAKERS[name](model)
    give_gradients(model, 0)
    skipped = [model.wpe.weight, model.h[0].mlp.c_fc.weight, model.h[1].ln_1.weight]
    before = [p.detach().clone() for p in skipped]
    for parameter in skipped:
        parameter.grad = None
    optimizer.step()
    assert_same_bits(before, [p.detach() for p in skipped])
    for parameter in model.parameters():
        parameter.grad = None
    optimizer.step()  # nothing at all


def test_muon_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"matrices, got shape \(3,\)"):
        Muon([{"params": [nn.Parameter(torch.zeros(3))]}])
    with pytest.raises(ValueError, match="'sgd'"):
        Muon([{"params": [nn.Parameter(torch.zeros(3))], "algorithm": "sgd"}])


def test_muon_works_with_torchs_schedulers():
    optimizer = muon(tiny(), lr=0.02, adamw_lr=0.003)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.0015, 0.0015]


# ---- schedules ---------------------------------------------------------------------------------


def test_warmup_cosine():
    factor = [warmup_cosine(step, warmup=10, total=110, floor=0.1) for step in range(130)]
    assert factor[:10] == [pytest.approx((step + 1) / 10) for step in range(10)]
    assert factor[9] == factor[10] == 1.0
    assert factor[60] == pytest.approx(0.55)  # half-way
    assert factor[110:] == [0.1] * 20
    assert all(a >= b for a, b in pairwise(factor[9:]))
    steps = [abs(a - b) for a, b in pairwise(factor[10:])]
    assert max(steps) < 0.9 * math.pi / 200 * 1.01  # no jump


def test_warmup_stable_decay():
    args = {"warmup": 10, "total": 100, "decay": 20}
    factor = [warmup_stable_decay(step, **args) for step in range(105)]
    assert factor[:10] == [pytest.approx((step + 1) / 10) for step in range(10)]
    assert factor[10:81] == [1.0] * 71
    assert factor[90] == pytest.approx(0.5)
    assert factor[99] == pytest.approx(0.05)
    assert factor[100:] == [0.0] * 5
    floored = [warmup_stable_decay(step, floor=0.2, **args) for step in range(105)]
    assert floored[90] == pytest.approx(0.6) and floored[104] == 0.2


def test_schedule_corners():
    assert warmup_cosine(0, warmup=0, total=1) == 1.0
    assert warmup_cosine(4, warmup=5, total=5) == 1.0
    assert warmup_stable_decay(4, warmup=0, total=5, decay=0) == 1.0
    assert warmup_stable_decay(5, warmup=0, total=5, decay=0) == 0.0
    for bad in ({"warmup": 6, "total": 5}, {"warmup": -1, "total": 5}, {"warmup": 0, "total": 0}):
        with pytest.raises(ValueError, match="warmup"):
            warmup_cosine(0, **bad)
    with pytest.raises(ValueError, match="floor"):
        warmup_cosine(0, warmup=0, total=5, floor=1.5)
    with pytest.raises(ValueError, match="decay"):
        warmup_stable_decay(0, warmup=2, total=5, decay=4)


def test_set_lr_scales_each_groups_own_rate():
    for optimizer in (adamw(tiny(), lr=0.5), muon(tiny(), lr=0.5, adamw_lr=0.25)):
        own = [group["lr"] for group in optimizer.param_groups]
        for factor in (0.5, 0.1, 1.0):
            set_lr(optimizer, factor)
            assert [group["lr"] for group in optimizer.param_groups] == [lr * factor for lr in own]


# ---- clipping ----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 1e9])
def test_clipping_is_torchs(max_norm: float):
    ours, theirs = tiny(), tiny()
    give_gradients(ours, 0)
    give_gradients(theirs, 0)
    norm = clip_grad_norm(ours.parameters(), max_norm)
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    assert torch.equal(norm, expected)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_leaves_gradients_that_are_not_finite(bad: float):
    model = tiny()
    give_gradients(model, 0)
    model.wte.weight.grad[0, 0] = bad
    before = [p.grad.clone() for p in model.parameters()]
    norm = clip_grad_norm(model.parameters(), 1.0)
    assert not norm.isfinite()
    for parameter, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, old, rtol=0, atol=0, equal_nan=True)


def test_clipping_measures_only():
    model = tiny()
    give_gradients(model, 0)
    before = [p.grad.clone() for p in model.parameters()]
    norm = clip_grad_norm(model.parameters(), 0)
    expected = math.sqrt(sum(g.double().square().sum().item() for g in before))
    assert norm.item() == pytest.approx(expected, rel=1e-5)
    assert_same_bits(before, [p.grad for p in model.parameters()])
    assert clip_grad_norm([], 1.0).item() == 0.0
    with pytest.raises(ValueError, match="max_norm"):
        clip_grad_norm(model.parameters(), -1.0)
