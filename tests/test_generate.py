"""Generation: the cache, padding and batching change no token; sampling follows its options."""

import dataclasses

import pytest
import torch
from test_gpt import CONFIGS, each_config

from fastattn.generate import _Sampler, generate, stream
from fastattn.gpt import GPT


def make_model(config, **changes):
    """Weights so large that the distributions differ much from token to token."""
    return GPT(dataclasses.replace(config, init_std=0.3, **changes)).eval()


def prompts(B=3, S=7):
    return torch.randint(61, (B, S), generator=torch.Generator().manual_seed(B))


def left_padded(rows):
    S = max(map(len, rows))
    idx, mask = torch.zeros(2, len(rows), S, dtype=torch.int64)
    for b, row in enumerate(rows):
        idx[b, S - len(row) :] = row
        mask[b, S - len(row) :] = 1
    return idx, mask


SAMPLING = {
    "greedy": {"temperature": 0},
    "sampled": {"seed": 3},
    "top_k": {"seed": 3, "temperature": 1.5, "top_k": 5},
    "top_p": {"seed": 3, "temperature": 0.8, "top_p": 0.7},
}
each_sampling = pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)


@each_config
@each_sampling
@pytest.mark.parametrize("new_tokens", [11, 28], ids=["in_block", "beyond_block"])
def test_cached_is_uncached(config, sampling, new_tokens):
    model = make_model(config)  # block_size 18
    cached, uncached = (
        model.generate(prompts(), max_new_tokens=new_tokens, use_cache=use_cache, **sampling)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)
    assert cached.shape == (3, 7 + new_tokens)


@each_config
@each_sampling
@pytest.mark.parametrize("new_tokens", [11, 28], ids=["in_block", "beyond_block"])
def test_cached_is_uncached_with_left_padding(config, sampling, new_tokens):
    model = make_model(config)
    idx, mask = left_padded([prompts()[0], prompts()[1, :1], prompts()[2, :4]])
    cached, uncached = (
        model.generate(
            idx, max_new_tokens=new_tokens, attention_mask=mask, use_cache=use_cache, **sampling
        )
        for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)
    assert torch.equal(cached[:, :7], idx)


@each_config
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_a_padded_row_is_the_row_alone(config, use_cache):
    model = make_model(config)
    rows = [prompts()[0], prompts()[1, :1], prompts()[2, :4]]
    idx, mask = left_padded(rows)
    together = model.generate(
        idx, max_new_tokens=28, temperature=0, attention_mask=mask, use_cache=use_cache
    )
    for b, row in enumerate(rows):
        alone = model.generate(row[None], max_new_tokens=28, temperature=0)
        assert torch.equal(together[b, 7:], alone[0, len(row) :])


@each_config
def test_greedy_is_the_argmax_of_the_model(config):
    model = make_model(config)
    tokens = model.generate(prompts(), max_new_tokens=11, temperature=0)
    with torch.no_grad():
        assert torch.equal(tokens[:, 7:], model(tokens[:, :-1])[:, 6:].argmax(-1))


def test_beyond_the_block_the_last_half_is_the_context():
    model = make_model(CONFIGS["gpt2"])
    tokens = model.generate(prompts(1, 18), max_new_tokens=24, temperature=0)[0]
    start = 0
    with torch.no_grad():
        for n in range(18, 42):
            if n - start > 18:
                start = n - 9
            assert tokens[n] == model(tokens[None, start:n])[0, -1].argmax()


def test_a_prompt_longer_than_the_block_is_cropped():
    model = make_model(CONFIGS["modern"])
    long = prompts(2, 50)
    got = model.generate(long, max_new_tokens=5, temperature=0)
    want = model.generate(long[:, -9:], max_new_tokens=5, temperature=0)
    assert torch.equal(got[:, 50:], want[:, 9:])


def test_seed_decides():
    model = make_model(CONFIGS["gpt2"])
    a, b, c = (model.generate(prompts(), max_new_tokens=20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    torch.manual_seed(9)
    a = model.generate(prompts(), max_new_tokens=20)
    torch.manual_seed(9)
    assert torch.equal(a, model.generate(prompts(), max_new_tokens=20))


def test_max_length_counts_the_prompt():
    model = make_model(CONFIGS["gpt2"])
    assert model.generate(prompts(), max_length=11).shape == (3, 11)
    assert torch.equal(model.generate(prompts(), max_length=7), prompts())
    assert torch.equal(model.generate(prompts(), max_new_tokens=0), prompts())


def test_rows_end_at_their_stop_token():
    model = make_model(CONFIGS["gpt2"])
    free = model.generate(prompts(), max_new_tokens=30, temperature=0)
    stop = free[0, 10].item()
    tokens = model.generate(prompts(), max_new_tokens=30, temperature=0, eos_token_id=stop)
    padded = model.generate(
        prompts(), max_new_tokens=30, temperature=0, eos_token_id=[stop], pad_token_id=60
    )
    ends = []
    for b in range(3):
        hits = (free[b, 7:] == stop).nonzero().flatten().tolist()
        ends.append(7 + hits[0] + 1 if hits else 37)
        end = min(ends[b], tokens.shape[1])
        assert torch.equal(tokens[b, :end], free[b, :end])
        assert (tokens[b, end:] == stop).all() and (padded[b, end:] == 60).all()
    assert tokens.shape == padded.shape == (3, max(ends))


def test_the_configs_stop_token_is_the_default():
    model = make_model(CONFIGS["gpt2"])
    stop = model.generate(prompts(1), max_new_tokens=9, temperature=0)[0, 9].item()
    model.config = dataclasses.replace(model.config, eos_token_id=stop)
    assert model.generate(prompts(1), max_new_tokens=9, temperature=0).shape[1] <= 10
    free = model.generate(prompts(1), max_new_tokens=9, temperature=0, eos_token_id=())
    assert free.shape[1] == 16


def test_stream_yields_the_same_tokens():
    model = make_model(CONFIGS["modern"]).train()
    tokens = list(stream(model, prompts(), max_new_tokens=9, seed=4))
    assert model.training
    assert torch.equal(
        torch.stack(tokens, dim=1), generate(model, prompts(), max_new_tokens=9, seed=4)[:, 7:]
    )
    assert tokens[0].shape == (3,)


def test_generating_leaves_no_trace_in_the_model():
    model = make_model(CONFIGS["gpt2"], dropout=0.5).train()
    a = model.generate(prompts(), max_new_tokens=9, temperature=0)
    assert torch.equal(a, model.generate(prompts(), max_new_tokens=9, temperature=0))
    assert model.training and not a.requires_grad


def test_bf16_generates_cached_as_uncached_shapes():
    model = make_model(CONFIGS["modern"]).bfloat16()
    assert model.generate(prompts(), max_new_tokens=9).shape == (3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert make_model(CONFIGS["gpt2"]).generate(prompts(), max_new_tokens=9).shape == (3, 16)


def sampled(logits, **options):
    settings = {"temperature": 1.0, "top_k": None, "top_p": None, "seed": 0, **options}
    sampler = _Sampler(device=torch.device("cpu"), **settings)
    tokens = sampler(logits.expand(20_000, -1))
    return torch.bincount(tokens, minlength=logits.shape[-1]) / tokens.numel()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"temperature": 0.5}, [0, 1, 2, 3]),
        ({"top_k": 2}, [0, 2]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.5}, [0]),
        ({"top_p": 0.51}, [0, 2]),
        ({"top_p": 0.89}, [0, 2, 1]),
        ({"top_k": 3, "top_p": 0.85}, [0, 2]),  # of the three kept, two have 0.8 / 0.9
    ],
    ids=str,
)
def test_sampling_follows_the_distribution(options, kept):
    probabilities = torch.tensor([0.5, 0.1, 0.3, 0.1 - 1e-4])
    expected = torch.zeros(4)
    expected[kept] = probabilities[kept] ** (1 / options.get("temperature", 1.0))
    found = sampled(probabilities.log(), **options)
    assert (found[expected == 0] == 0).all()
    torch.testing.assert_close(found, expected / expected.sum(), rtol=0.0, atol=0.015)


def test_bad_arguments():
    model = make_model(CONFIGS["gpt2"])

    def refused(error, message, idx=None, **options):
        with pytest.raises(error, match=message):
            stream(model, prompts() if idx is None else idx, **{"max_new_tokens": 3, **options})

    refused(ValueError, "one of max_new_tokens and max_length", max_length=9)
    refused(ValueError, "one of max_new_tokens and max_length", max_new_tokens=None)
    refused(ValueError, "-3 new tokens", max_new_tokens=None, max_length=4)
    refused(ValueError, "temperature", temperature=-0.1)
    refused(ValueError, "top_k", top_k=0)
    refused(ValueError, "top_p", top_p=0.0)
    refused(TypeError, "int64", idx=torch.zeros(1, 3))
    refused(ValueError, "shape", attention_mask=torch.ones(3, 6))
    mask = torch.ones(3, 7)
    mask[1, -1] = 0
    refused(ValueError, "left", attention_mask=mask)
    refused(ValueError, "at least one token", attention_mask=torch.zeros(3, 7))
    refused(ValueError, "at least one token", idx=prompts()[:, :0])
