"""GPTConfig and GPT: validation, shapes, parameter names and counts, gradients, training."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from fastattn.gpt import GPT, GPTConfig

SMALL = {"vocab_size": 61, "block_size": 18, "n_layer": 2, "n_head": 4, "n_embd": 48}
MODERN = {
    **SMALL,
    "n_kv_head": 2,
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "position": "rope",
    "qk_norm": True,
    "bias": False,
    "tie_embeddings": False,
    "attn_softcap": 20.0,
    "logit_softcap": 15.0,
    "window": 7,
}
CONFIGS = {
    "gpt2": GPTConfig(**SMALL),
    "modern": GPTConfig(**MODERN),
    "relu2": GPTConfig(**{**SMALL, "mlp": "relu2", "position": "rope", "bias": False}),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def batch(config, B=3, T=15):
    tokens = torch.randint(config.vocab_size, (B, T + 1))
    return tokens[:, :-1].clone(), tokens[:, 1:].clone()


# --- the config -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "batchnorm"}, "norm must be one of"),
        ({"mlp": "erf"}, "mlp must be one of"),
        ({"position": "alibi"}, "position must be one of"),
        ({"n_layer": 0}, "n_layer must be at least 1"),
        ({"n_kv_head": 0}, "n_kv_head must be at least 1"),
        ({"n_embd": 50}, "n_embd 50 must be a multiple of n_head 4"),
        ({"n_kv_head": 3}, "n_head 4 must be a multiple of n_kv_head 3"),
        ({"n_head": 1, "n_embd": 257}, "at most 256"),
        ({"n_embd": 36, "position": "rope"}, "even head dim"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"window": -2}, "window must be at least -1"),
        ({"attn_softcap": -1.0}, "attn_softcap must be at least 0"),
    ],
    ids=str,
)
def test_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**SMALL, **change})


@each_config
def test_config_round_trips_through_json(config):
    assert GPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_refuses_unknown_keys_with_a_suggestion():
    with pytest.raises(ValueError, match="unknown key 'n_heads'; did you mean 'n_head'"):
        GPTConfig.from_dict({"n_heads": 4})


def test_kv_bytes():
    cache = GPT(CONFIGS["modern"]).new_cache(3, 10)
    assert cache.nbytes == 30 * CONFIGS["modern"].kv_bytes_per_token(torch.float32)
    assert GPTConfig().kv_bytes_per_token(torch.bfloat16) == 2 * 12 * 768 * 2


# --- the model ------------------------------------------------------------------------------------


def test_gpt2_small_has_the_published_size():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert model.num_params() == 124_439_808
    assert model.num_params(embeddings=False) == 124_439_808 - 1024 * 768
    with torch.device("meta"):
        padded = GPT(GPTConfig(vocab_size=50304))
    assert padded.flops_per_token(1024) == 6 * 123_689_472 + 12 * 12 * 768 * 1024


def test_untied_embeddings_are_no_flops():
    tied, untied = (
        GPT(dataclasses.replace(CONFIGS["modern"], tie_embeddings=tie)) for tie in (True, False)
    )
    assert untied.num_params() == tied.num_params() + 61 * 48
    assert untied.flops_per_token(24) == tied.flops_per_token(24)


def test_parameters_have_gpt2_names():
    names = {name for name, _ in GPT(CONFIGS["gpt2"]).named_parameters()}
    layer = {
        f"{part}.{kind}"
        for part in ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        for kind in ("weight", "bias")
    }
    want = {f"h.{i}.{name}" for i in range(2) for name in layer}
    assert names == want | {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"}
    assert set(GPT(CONFIGS["gpt2"]).state_dict()) == names


@each_config
def test_loss_is_cross_entropy_of_the_logits(config):
    model, (idx, targets) = GPT(config), batch(config)
    targets[0, :5] = -100
    logits = model(idx)
    assert logits.shape == (3, 15, 61)
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    rows = model(idx, targets, reduction="none")
    torch.testing.assert_close(rows.flatten(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(idx, targets, reduction="sum"), want.sum())
    loss, mean = model(idx, targets), want.sum() / (targets >= 0).sum()
    torch.testing.assert_close(loss, mean)
    leaves = list(model.parameters())  # among them a tied wte, with a gradient from either end
    for got, expected in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(mean, leaves), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@each_config
def test_a_fresh_model_knows_nothing(config):
    loss = GPT(config)(*batch(config)).item()
    assert abs(loss - torch.tensor(config.vocab_size).log().item()) < 0.1


@each_config
def test_logits_see_the_past_alone(config):
    model, (idx, _) = GPT(config).eval(), batch(config)
    changed = idx.clone()
    changed[:, 9] = (changed[:, 9] + 1) % config.vocab_size
    before, after = model(idx), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).any(dim=-1).all()


@each_config
def test_backends_agree_on_loss_and_gradients(config):
    model, (idx, targets) = GPT(config), batch(config)
    gradients = []
    for backend in (None, "reference"):
        loss = model(idx, targets, backend=backend)
        gradients.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@each_config
def test_activation_checkpointing_changes_no_gradient(config):
    model = GPT(dataclasses.replace(config, dropout=0.2))
    idx, targets = batch(config)
    gradients = []
    for on in (False, True):
        model.activation_checkpointing = on
        torch.manual_seed(5)
        gradients.append(torch.autograd.grad(model(idx, targets), list(model.parameters())))
    for got, want in zip(*gradients, strict=True):
        assert torch.equal(got, want)


@each_config
def test_a_batch_can_be_learnt_by_heart(config):
    model, (idx, targets) = GPT(config), batch(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(idx, targets)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@each_config
def test_bf16_autocast_is_close(config):
    model, (idx, targets) = GPT(config), batch(config)
    want = model(idx, targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, targets)
        assert model(idx).dtype == torch.bfloat16
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters()
    )
    torch.testing.assert_close(loss, want, rtol=2e-2, atol=0.0)


def test_dropout_is_off_in_eval():
    config = dataclasses.replace(CONFIGS["gpt2"], dropout=0.5)
    model, (idx, _) = GPT(config), batch(config)
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


def test_bad_tokens():
    model = GPT(CONFIGS["gpt2"])
    with pytest.raises(ValueError, match="19 tokens are more than the context of 18"):
        model(torch.zeros(1, 19, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"got torch.float32 \(1, 3\)"):
        model(torch.zeros(1, 3))
    with pytest.raises(TypeError, match=r"got torch.int64 \(3,\)"):
        model(torch.zeros(3, dtype=torch.int64))


def test_initialisation():
    config = GPTConfig(vocab_size=500, block_size=64, n_layer=8, n_head=2, n_embd=128)
    model = GPT(config)
    for name, parameter in model.named_parameters():
        if "ln_" in name:
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # √(2 · 8) = 4
            assert parameter.std().item() == pytest.approx(std, rel=0.05)
