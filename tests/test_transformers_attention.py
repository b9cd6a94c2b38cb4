"""attn_implementation="fastattn": logits, gradients and generated tokens are eager's."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers_models import (
    PAD,
    VOCABULARY,
    is_5,
    make,
    padding,
    results,
    tokens,
    transformers,
)

import fastattn
from fastattn.integrations.transformers import attention_forward, register
from fastattn.integrations.transformers.masks import Visible
from fastattn.testing import Results, assert_results_close

pytestmark = pytest.mark.usefixtures("one_thread")

DECODERS = ["gpt2", "llama", "mistral", "qwen3", "qwen2_moe", "gemma2", "gpt_oss"]
each_padding = pytest.mark.parametrize("side", [None, "left", "right"])
needs_5 = pytest.mark.skipif(not is_5(), reason="transformers 4 doesn't go through its interface")


def assert_same(got: Results, want: Results) -> None:
    """Both were computed in fp32, from numbers of about 1: they differ by rounding."""
    assert got.keys() == want.keys()
    for key, value in want.items():
        error, bound = (got[key] - value).abs().max(), 2e-5 * value.abs().max() + 2e-6
        assert error <= bound, f"{key}: differs by {error:.2e}, allowed are {bound:.2e}"


def assert_equals_eager(name: str, compute) -> None:
    assert_same(*(results(make(name, attention), compute) for attention in ("fastattn", "eager")))


# --- logits and gradients -------------------------------------------------------------------------


@each_padding
@pytest.mark.parametrize("name", [*DECODERS, pytest.param("llama4", marks=needs_5)])
def test_decoders(name, side):
    ids, mask = tokens(), padding(side)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    assert_equals_eager(name, lambda m: m(ids, attention_mask=mask, use_cache=False).logits[real])


@needs_5
@each_padding
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_encoders(name, side):
    ids, mask = tokens(), padding(side)
    rows = slice(None) if name == "bert" or mask is None else mask.bool()
    assert_equals_eager(name, lambda m: m(ids, attention_mask=mask).logits[rows])


@needs_5
@each_padding
def test_encoder_decoder_with_position_bias(side):
    ids, target, mask = tokens(), tokens(3, 8), padding(side)
    assert_equals_eager("t5", lambda m: m(ids, attention_mask=mask, labels=target).logits)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_packed_by_position_ids(name):
    """Three sequences a row, told apart by positions: as if each were alone."""
    ids, lengths = tokens(2), [8, 2, 7]
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)

    def packed(m):
        return m(ids, position_ids=positions, use_cache=False).logits

    def alone(m):
        parts = ids.split(lengths, 1)
        return torch.cat([m(part, use_cache=False).logits for part in parts], 1)

    assert_equals_eager(name, packed)
    ours = make(name)
    torch.testing.assert_close(packed(ours), alone(ours), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_packed_by_offsets(name, cached):
    """With the keyword arguments of the flattening data collator; a cache is no obstacle."""
    features = [{"input_ids": row[:n].tolist()} for row, n in zip(tokens(), (9, 3, 5), strict=True)]
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate(features, return_tensors="pt")
    del batch["labels"]
    ours = make(name)
    got = ours(**batch, use_cache=cached).logits[0]
    alone = [ours(torch.tensor([f["input_ids"]])).logits[0] for f in features]
    torch.testing.assert_close(got, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_users_own_masks():
    """4-D, bool or float: complete, no causality on top."""
    ids = tokens(2, 9)
    visible = torch.rand(2, 1, 9, 9) < 0.6
    visible |= torch.eye(9).bool()
    added = torch.zeros(2, 1, 9, 9).masked_fill(~visible, torch.finfo(torch.float32).min)
    eager = make("llama", "eager")(ids, attention_mask=added).logits
    ours = make("llama")
    for mask in (visible, added):
        torch.testing.assert_close(
            ours(ids, attention_mask=mask).logits, eager, rtol=1e-4, atol=1e-4
        )


@needs_5
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bert", "t5"])
def test_weights_on_request(name):
    """The whole matrices, which sdpa doesn't have."""
    ids, mask = tokens(), padding("left")

    def weights(attention):
        extra = {"decoder_input_ids": ids[:, :5]} if name == "t5" else {}
        out = make(name, attention)(ids, attention_mask=mask, output_attentions=True, **extra)
        if name == "t5":
            return out.encoder_attentions + out.decoder_attentions + out.cross_attentions
        rows = mask.bool() if name != "bert" else torch.ones_like(mask).bool()
        return tuple(w.transpose(1, 2)[rows] for w in out.attentions)

    for ours, eager in zip(weights("fastattn"), weights("eager"), strict=True):
        assert_same({"weights": ours}, {"weights": eager})


def test_dropout_and_checkpointing():
    """Weights are dropped in training only, and the same ones when a layer is run again."""
    model = make("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    ids = tokens()
    plain = make("llama")(ids).logits
    torch.testing.assert_close(model(ids).logits, plain)
    model.train()
    want = results(model, lambda m: (torch.manual_seed(1), m(ids, use_cache=False).logits)[1])
    assert not torch.allclose(want["out"], plain)
    model.gradient_checkpointing_enable()
    got = results(model, lambda m: (torch.manual_seed(1), m(ids, use_cache=False).logits)[1])
    assert_same(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    ids, mask = tokens(), padding("left")
    real = mask.bool()
    ours, eager = (make("llama", a).to(dtype) for a in ("fastattn", "eager"))
    exact = copy.deepcopy(eager).float()
    outs = [{"out": m(ids, attention_mask=mask).logits[real]} for m in (ours, exact, eager)]
    assert_results_close(*outs)
    with torch.autocast("cpu", dtype):
        assert make("llama")(ids, attention_mask=mask).logits.dtype == dtype


@pytest.mark.parametrize(
    "name, given", [("gpt2", "nothing"), ("gemma2", "padding"), ("mistral", "packed")]
)
def test_compiled(name, given):
    ids = tokens(2)
    extra = {}
    if given == "padding":
        extra = {"attention_mask": padding("left", 2)}
    elif given == "packed":
        extra = {"position_ids": torch.cat([torch.arange(8), torch.arange(9)]).expand(2, -1)}
    real = extra.get("attention_mask", torch.ones_like(ids)).bool()
    model = make(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    want = results(model, lambda m: m(ids, use_cache=False, **extra).logits[real])
    got = results(model, lambda m: compiled(ids, use_cache=False, **extra).logits[real])
    assert_same(got, want)


# --- generation -----------------------------------------------------------------------------------


def generated(model, ids, **options):
    return model.generate(ids, max_new_tokens=8, pad_token_id=PAD, **options).tolist()


def assert_generates_as_eager(name, ids, **options):
    ours, eager = (generated(make(name, a), ids, **options) for a in ("fastattn", "eager"))
    assert ours == eager


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_greedy(name, side):
    ids = tokens()
    mask = torch.ones_like(ids) if side is None else padding(side)
    options = {"attention_mask": mask, "do_sample": False, "eos_token_id": None}
    eager = generated(make(name, "eager"), ids, **options)
    assert generated(make(name), ids, **options) == eager
    if name == "qwen2_moe" and not is_5():
        return  # transformers 4 makes masks of the wrong length for its static cache
    assert generated(make(name), ids, cache_implementation="static", **options) == eager


@needs_5
@pytest.mark.parametrize("beams", [1, 3])
def test_translation(beams):
    ids, mask = tokens(), padding("right")
    assert_generates_as_eager("t5", ids, attention_mask=mask, num_beams=beams, do_sample=False)


def test_beams():
    ids = tokens()
    assert_generates_as_eager("mistral", ids, attention_mask=padding("left"), num_beams=3)


def test_assisted():
    """Several queries at a time against a cache."""
    ids = tokens(1)
    got = generated(make("llama"), ids, do_sample=False, assistant_model=make("llama-tied"))
    assert got == generated(make("llama", "eager"), ids, do_sample=False)


def test_prefill_in_chunks():
    ids = tokens(1, 20)
    for name in ("llama", "mistral"):
        model, cache = make(name), transformers.DynamicCache(config=make(name).config)
        parts = [model(part, past_key_values=cache).logits for part in ids.split([7, 1, 5, 7], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, rtol=1e-4, atol=1e-4)


def test_from_a_folder_by_one_more_argument(tmp_path):
    make("gpt2").save_pretrained(tmp_path)
    ids = tokens(1, 5)
    outs = []
    for attention in ("fastattn", "eager"):
        model = transformers.GPT2LMHeadModel.from_pretrained(
            tmp_path, attn_implementation=attention
        )
        torch.manual_seed(0)
        outs.append(model.generate(ids, max_length=60, do_sample=True, temperature=0.7))
    assert outs[0].tolist() == outs[1].tolist()


# --- that it is our kernels, and what they refuse -------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """What the attention function asks of the public functions: (name, options)."""
    from fastattn.integrations.transformers import attention as module

    seen = []

    def spy(name):
        function = getattr(fastattn, name)

        def called(*args, **options):
            seen.append((name, options))
            return function(*args, **options)

        return called

    for name in ("attention", "attention_varlen", "attention_decode"):
        monkeypatch.setattr(module, name, spy(name))
    return seen


def test_no_mask_is_as_large_as_the_scores(calls):
    ids = tokens()
    model = make("gemma2")
    model(ids, attention_mask=padding("left"))
    assert [options["window"] for _, options in calls] == [(5, 0), (-1, 0)]
    assert all(options["mask"].shape == (3, 1, 1, 17) for _, options in calls)
    calls.clear()
    model(ids, attention_mask=padding("left").fill_(1))
    assert [options["mask"] for _, options in calls] == [None, None]
    calls.clear()
    positions = torch.cat([torch.arange(8), torch.arange(9)]).expand(3, -1)
    model(ids, position_ids=positions, use_cache=False)
    assert [name for name, _ in calls] == ["attention_varlen"] * 2


@pytest.mark.parametrize("name, left", [("llama", [5, 9, 0]), ("mistral", None)])
def test_decoding_has_its_own_kernel(name, left, calls):
    """Mistral's window is past the padding by then."""
    generated(make(name), tokens(), attention_mask=padding("left"), do_sample=False)
    assert [name for name, _ in calls[:2]] == ["attention"] * 2
    assert {name for name, _ in calls[2:]} == {"attention_decode"}
    given = calls[2][1]["cache_leftpad"]
    assert (given if given is None else given.tolist()) == left


@needs_5
@pytest.mark.parametrize("name, left", [("llama", [5, 9, 0]), ("mistral", [0, 0, 0])])
def test_so_has_a_static_cache(name, left, calls):
    """No key behind the last query is read: neither by the prompt nor by a token."""
    options = {"attention_mask": padding("left"), "do_sample": False}
    generated(make(name), tokens(), cache_implementation="static", **options)
    assert [name for name, _ in calls[:2]] == ["attention"] * 2
    assert {name for name, _ in calls[2:]} == {"attention_decode"}
    assert calls[2][1]["cache_seqlens"].tolist() == [18] * 3 or name == "mistral"
    assert calls[2][1]["cache_leftpad"].tolist() == left


def counting():
    """A backend for torch.compile, and a list of what its graphs call.

    A function: transformers copies its configurations, which would copy an object.
    """
    graphs = []

    def run_as_it_is(graph, _):
        operators = (getattr(torch.ops.fastattn, n) for n in ("attn_fwd", "attn_decode_read"))
        called = [node.target for node in graph.graph.nodes]
        graphs.append({operator.__name__: called.count(operator) for operator in operators})
        return graph

    return run_as_it_is, graphs


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_a_static_cache_compiled(name, side):
    """Decoded by lengths, which are tensors: one graph for all tokens.

    A second one where transformers has another for a sliding cache that is full.
    """
    ids = tokens()
    mask = torch.ones_like(ids) if side is None else padding(side)
    options = {"attention_mask": mask, "do_sample": False, "eos_token_id": None}
    backend, graphs = counting()
    config = transformers.CompileConfig(fullgraph=True, dynamic=None, backend=backend, mode=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    got = generated(
        make(name), ids, cache_implementation="static", compile_config=config, **options
    )
    assert got == generated(make(name, "eager"), ids, **options)
    assert graphs == [{"attn_fwd": 0, "attn_decode_read": 2}] * (2 if name == "gemma2" else 1)


def test_a_model_compiled_with_its_mask():
    """No padding: the mask is made in the graph, and says the same there."""
    model, eager, ids = make("llama"), make("llama", "eager"), tokens()
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    backend, graphs = counting()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        want = eager(ids).logits[:, 10:]
        positions = torch.arange(17)
        model(ids[:, :10], past_key_values=cache, cache_position=positions[:10])
        for i in range(10, 17):
            token = ids[:, i : i + 1].clone()
            got = compiled(
                token, past_key_values=cache, cache_position=positions[i : i + 1].clone()
            )
            torch.testing.assert_close(got.logits[:, 0], want[:, i - 10], rtol=1e-4, atol=1e-4)
    assert graphs == [{"attn_fwd": 0, "attn_decode_read": 2}]


def test_register_under_another_name():
    register("kernels_by_hand")
    ids = tokens(1)
    model = make("gpt2")
    want = model(ids).logits
    model.set_attn_implementation("kernels_by_hand")
    assert torch.equal(model(ids).logits, want)


PADDED = Visible(4, 4, (-1, 0), torch.ones(1, 4).bool())
OFFSETS = {
    **{f"cu_seq_lens_{side}": torch.tensor([0, 4]) for side in "qk"},
    **{f"max_length_{side}": 4 for side in "qk"},
}


def qkv(length=4):
    return (torch.randn(1, 2, length, 8) for _ in range(3))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"head_mask": torch.ones(1)}, "head_mask"),
        ({"cache": object()}, "paged cache"),
        ({"attention_mask": torch.ones(1, 4)}, "4-D.*got 2 dimensions"),
        ({"attention_mask": Visible(5, 5, (-1, 0))}, "made for 5 keys.*has 4"),
        ({"attention_mask": PADDED, **OFFSETS}, "padding.*cu_seq_lens_q"),
        ({"attention_mask": torch.ones(1, 1, 4, 4), **OFFSETS}, "can't both"),
        ({**OFFSETS, "cu_seq_lens_k": None}, "needs cu_seq_lens_k"),
        ({**OFFSETS, "output_attentions": True}, "output_attentions.*packed"),
        ({**OFFSETS, "position_bias": torch.zeros(1, 2, 4, 4)}, "position_bias.*packed"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        attention_forward(torch.nn.Module(), *qkv(), **{"attention_mask": None, **arguments})


def test_logits_are_over_the_vocabulary():
    assert make("gpt2")(tokens()).logits.shape == (3, 17, VOCABULARY)


def test_register_in_place_of_sdpa(calls, monkeypatch):
    """What runs on sdpa unasked runs on the kernels, with not a word changed."""
    masks = transformers.AttentionMaskInterface._global_mapping
    for mapping in (transformers.AttentionInterface._global_mapping, masks):
        monkeypatch.setitem(mapping, "sdpa", mapping["sdpa"])  # puts it back afterwards
    ids, mask = tokens(), padding("left")
    want = make("llama", "sdpa")(ids, attention_mask=mask).logits[mask.bool()]
    assert calls == []
    register("sdpa")
    got = make("llama", "sdpa")(ids, attention_mask=mask).logits[mask.bool()]
    assert len(calls) == 2
    assert_same({"out": got}, {"out": want})
