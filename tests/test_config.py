"""TrainConfig: derived values, refusals, and reading from TOML and JSON."""

import dataclasses
import json

import pytest

from fastattn.config import TrainConfig, merge, read_toml, to_dict
from fastattn.gpt import GPTConfig
from fastattn.presets import PRESETS, SUMMARIES

MODEL = GPTConfig(block_size=64)


def test_accumulation_follows_from_tokens():
    config = TrainConfig(model=MODEL, batch_size=4, tokens_per_step=4 * 64 * 5)
    assert config.T == 64
    assert config.accumulation == 5
    assert TrainConfig(model=MODEL, batch_size=4).accumulation == 1
    assert TrainConfig(model=MODEL, batch_size=4, seq_len=32, tokens_per_step=256).accumulation == 2


@pytest.mark.parametrize(
    ("tokens", "nearest"), [(300, 256), (400, 512), (1, 256), (1000, 1024), (256 + 128, 512)]
)
def test_indivisible_tokens_name_the_nearest_valid_value(tokens, nearest):
    with pytest.raises(ValueError, match=rf"tokens_per_step {tokens} .* the nearest is {nearest}$"):
        TrainConfig(model=MODEL, batch_size=4, tokens_per_step=tokens)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0),
        ("steps", 0),
        ("seq_len", 65),
        ("seq_len", 0),
        ("beta2", 1.0),
        ("decay", 1.5),
        ("final_lr", -0.1),
        ("clip", -1.0),
        ("max_minutes", 0.0),
        ("eval_tokens", -1),
        ("keep_checkpoints", 0),
    ],
)
def test_impossible_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        TrainConfig(model=MODEL, **{field: value})


def test_eval_windows():
    assert TrainConfig(model=MODEL, eval_tokens=640).eval_windows == 10
    assert TrainConfig(model=MODEL, eval_tokens=1).eval_windows == 1
    assert TrainConfig(model=MODEL, eval_tokens=0).eval_windows is None


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    config = PRESETS[name]
    assert name in SUMMARIES
    assert merge(TrainConfig(), json.loads(json.dumps(to_dict(config))), "test") == config


def test_nanogpt_preset_is_nanogpts_recipe():
    config = PRESETS["nanogpt-cpu"]
    m = config.model
    assert (m.n_layer, m.n_head, m.n_embd, m.block_size, m.dropout) == (4, 4, 128, 64, 0.0)
    assert (m.norm, m.mlp, m.position) == ("layernorm", "gelu", "learned")
    assert (config.batch_size, config.steps, config.lr, config.beta2) == (12, 2000, 1e-3, 0.99)
    assert (config.final_lr * config.lr, config.warmup_steps, config.clip) == (1e-4, 100, 1.0)
    assert config.optimizer == "adamw" and config.weight_decay == 0.1


def test_toml_is_merged_into_nested_configs(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('steps = 7\nlr = 1\nmax-minutes = 2.5\nout = "runs/x"\n[model]\nn_layer = 3\n')
    config = merge(TrainConfig(model=MODEL), read_toml(path), str(path))
    assert (config.steps, config.lr, config.max_minutes) == (7, 1.0, 2.5)
    assert isinstance(config.lr, float)
    assert str(config.out) == "runs/x"
    assert config.model == dataclasses.replace(MODEL, n_layer=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stps = 7", "unknown key stps; did you mean steps"),
        ("[model]\nn_layers = 3", "unknown key model.n_layers; did you mean model.n_layer"),
        ("qwertyuiop = 1", "unknown key qwertyuiop$"),
        ('steps = "many"', "steps must be an integer, got 'many'"),
        ("steps = 1.5", "steps must be an integer"),
        ("steps = true", "steps must be an integer, got True"),
        ('tensorboard = "yes"', "tensorboard must be true or false"),
        ('optimizer = "sgd"', "optimizer must be one of 'adamw', 'muon', got 'sgd'"),
        ("model = 3", "model must be a table"),
        ("batch_size = 0", "batch_size must be at least 1"),
        ("[model]\nn_head = 5", "n_embd 768 must be a multiple of n_head 5"),
        ("steps = ", "is not valid TOML"),
    ],
)
def test_bad_toml_is_refused_with_the_file_and_the_reason(tmp_path, text, message):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"run\.toml.*{message}"):
        merge(TrainConfig(), read_toml(path), str(path))
