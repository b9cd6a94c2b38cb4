"""Checkpoints in Hugging Face's layout: round trips, and parity with transformers both ways."""

import dataclasses
import json
import os

import pytest
import torch
from test_gpt import CONFIGS, SMALL, each_config

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

from fastattn.gpt import GPT, GPTConfig


def tokens(B=2, T=13):
    return torch.randint(61, (B, T))


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def saved(tmp_path):
    """A GPT-2 checkpoint as save_pretrained writes it."""
    torch.manual_seed(0)
    GPT(GPTConfig(**SMALL, init_std=0.2)).save_pretrained(tmp_path)
    return tmp_path


# --- our own round trips --------------------------------------------------------------------------


@each_config
@pytest.mark.parametrize("max_shard_bytes", [2**30, 30_000, 1], ids=["one", "few", "many"])
def test_round_trip(config, max_shard_bytes, tmp_path):
    config = dataclasses.replace(config, dropout=0.25, eos_token_id=3, norm_eps=1e-6)
    model = GPT(config)
    model.save_pretrained(tmp_path / "new" / "folder", max_shard_bytes=max_shard_bytes)
    loaded = GPT.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == config and not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_second_save_leaves_no_files_of_the_first(tmp_path):
    model = GPT(CONFIGS["modern"])
    for max_shard_bytes in (30_000, 2**30, 50_000):
        torch.nn.init.normal_(model.wte.weight)
        model.save_pretrained(tmp_path, max_shard_bytes=max_shard_bytes)
        assert torch.equal(GPT.from_pretrained(tmp_path).wte.weight, model.wte.weight)
        index = tmp_path / "model.safetensors.index.json"
        named = {"model.safetensors"}
        if index.exists():
            stored = json.loads(index.read_text())
            named = {index.name, *stored["weight_map"].values()}
            assert stored["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
        assert {path.name for path in tmp_path.iterdir()} == {"config.json", *named}


def test_dtype_and_dropout_on_loading(saved):
    model = GPT.from_pretrained(saved, dtype=torch.bfloat16, dropout=0.4)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.dropout == 0.4
    edit_json(saved / "config.json", attn_pdrop=0.3)
    with pytest.raises(ValueError, match=r"'attn_pdrop': 0.3.*dropout="):
        GPT.from_pretrained(saved)
    assert GPT.from_pretrained(saved, dropout=0.0).config.dropout == 0.0


def test_names_and_layout_variants_load_alike(saved):
    """Without prefix, with a tied head's copy and old checkpoints' mask buffers, in fp16."""
    want = GPT.from_pretrained(saved).half().float().state_dict()
    stored = load_file(saved / "model.safetensors")
    assert stored["transformer.h.0.mlp.c_fc.weight"].shape == (48, 192)  # (in, out)
    variant = {key.removeprefix("transformer."): value.half() for key, value in stored.items()}
    variant["lm_head.weight"] = variant["wte.weight"].clone()
    for i in range(2):
        variant[f"h.{i}.attn.bias"] = torch.ones(1, 1, 18, 18).tril()
        variant[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(variant, saved / "model.safetensors")
    loaded = GPT.from_pretrained(saved).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in want.items())


# --- what can't be loaded -------------------------------------------------------------------------


def test_a_name_is_no_folder():
    with pytest.raises(FileNotFoundError, match=r"no folder 'no-such-gpt2'.*hf download"):
        GPT.from_pretrained("no-such-gpt2")


def test_an_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"activation_function": "gelu"}, "activation_function 'gelu'; GPT needs 'gelu_new'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"n_inner": 100}, r"c_fc.* has shape"),
        ({"n_layer": 1}, r"h\.1\..* has no place"),
        ({"n_layer": 3}, r"has no h\.2\.attn\.c_attn\.bias"),
        ({"tie_word_embeddings": False}, r"has no lm_head\.weight"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit(saved, change, message):
    edit_json(saved / "config.json", **change)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(saved)


def test_unknown_fields_of_our_own_config_are_refused(tmp_path):
    GPT(CONFIGS["modern"]).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", n_heads=3)
    with pytest.raises(ValueError, match="did you mean 'n_head'"):
        GPT.from_pretrained(tmp_path)


def test_weights_are_on_disk_for_all_who_may_read(tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync

    def noted(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    GPT(CONFIGS["modern"]).save_pretrained(tmp_path)
    weights, config = (tmp_path / name for name in ("model.safetensors", "config.json"))
    assert weights.stat().st_ino in synced
    assert weights.stat().st_mode == config.stat().st_mode


def test_damaged_files_are_named(saved):
    os.truncate(saved / "model.safetensors", 100)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        GPT.from_pretrained(saved)
    (saved / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json has model_type None"):
        GPT.from_pretrained(saved)


def test_weights_that_are_absent(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="is a pickle"):
        GPT.from_pretrained(saved)
    index = {"weight_map": {"wte.weight": "../elsewhere.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    (saved.parent / "elsewhere.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="not in its folder"):
        GPT.from_pretrained(saved)


# --- transformers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def hf_config(transformers, **changes):
    sizes = {"vocab_size": 61, "n_positions": 19, "n_embd": 30, "n_layer": 3, "n_head": 5}
    tokens = {"bos_token_id": None, "eos_token_id": None}
    return transformers.GPT2Config(**{**sizes, **tokens, "initializer_range": 0.3, **changes})


def assert_same_model(ours, theirs):
    """Equal logits on the same tokens, to fp32 rounding, and the same greedy text."""
    idx = tokens()
    with torch.no_grad():
        torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=1e-5, atol=1e-5)
    all_seen = torch.ones_like(idx)  # else transformers takes what equals pad_token_id for padding
    text = theirs.generate(
        idx, max_length=18, do_sample=False, pad_token_id=0, attention_mask=all_seen
    )
    assert torch.equal(ours.generate(idx, max_length=18, temperature=0), text)


@pytest.mark.parametrize("changes", [{}, {"n_inner": 70}, {"tie_word_embeddings": False}], ids=str)
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_we_read_what_transformers_writes(transformers, changes, shard, tmp_path):
    theirs = transformers.GPT2LMHeadModel(hf_config(transformers, **changes)).eval()
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "5GB")
    assert_same_model(GPT.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("changes", [{}, {"n_inner": 70}, {"tie_embeddings": False}], ids=str)
@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000])
def test_transformers_reads_what_we_write(transformers, changes, max_shard_bytes, tmp_path):
    config = GPTConfig(**{**SMALL, "n_embd": 36, "n_head": 3}, init_std=0.3)
    ours = GPT(dataclasses.replace(config, **changes)).eval()
    ours.save_pretrained(tmp_path, max_shard_bytes=max_shard_bytes)
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_model(ours, theirs.eval())


def test_we_read_a_bare_gpt2_model(transformers, tmp_path):
    """GPT2Model has no head; its checkpoint has no prefix."""
    theirs = transformers.GPT2Model(hf_config(transformers)).eval()
    theirs.save_pretrained(tmp_path)
    ours, idx = GPT.from_pretrained(tmp_path), tokens()
    with torch.no_grad():
        want = theirs(idx).last_hidden_state
        torch.testing.assert_close(ours.hidden(idx), want, rtol=1e-5, atol=1e-5)


def test_losses_agree(transformers, tmp_path):
    theirs = transformers.GPT2LMHeadModel(hf_config(transformers)).eval()
    theirs.save_pretrained(tmp_path)
    idx = tokens()
    loss = GPT.from_pretrained(tmp_path)(idx[:, :-1], idx[:, 1:])
    torch.testing.assert_close(loss, theirs(idx, labels=idx).loss, rtol=1e-5, atol=1e-5)


def test_left_padded_prompts_give_transformers_text(transformers, tmp_path):
    theirs = transformers.GPT2LMHeadModel(hf_config(transformers)).eval()
    theirs.save_pretrained(tmp_path)
    idx, mask = tokens(3, 6), torch.ones(3, 6, dtype=torch.int64)
    mask[1, :3], mask[2, :5] = 0, 0
    ours = GPT.from_pretrained(tmp_path).generate(
        idx, max_length=17, temperature=0, attention_mask=mask
    )
    text = theirs.generate(idx, max_length=17, do_sample=False, attention_mask=mask, pad_token_id=0)
    assert torch.equal(ours, text)


def test_the_stop_token_is_transformers(transformers, tmp_path):
    theirs = transformers.GPT2LMHeadModel(hf_config(transformers)).eval()
    text = theirs.generate(tokens(1, 5), max_length=18, do_sample=False, pad_token_id=0)
    stop = text[0, 9].item()
    theirs.config.eos_token_id = stop
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config.eos_token_id == stop
    ours.save_pretrained(tmp_path)
    assert transformers.GPT2Config.from_pretrained(tmp_path).eos_token_id == stop
