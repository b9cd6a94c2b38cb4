"""Sampling windows: each once an epoch, resumed exactly, the same order on any number of ranks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fastattn.sampler import Permutation, WindowSampler, eval_batches

TOKENS = np.arange(1000, dtype=np.uint16)  # token = position, so batches show where they are from


def starts(inputs: torch.Tensor) -> list[int]:
    return inputs[:, 0].tolist()


def test_batch_is_windows_and_their_successors():
    inputs, targets = WindowSampler(TOKENS, 16).batch(5)
    assert inputs.shape == targets.shape == (5, 16)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous() and targets.is_contiguous()
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(16))
    assert torch.equal(targets, inputs + 1)


@pytest.mark.parametrize(
    ("n", "seq_len"), [(1000, 16), (1000, 1), (17, 16), (18, 16), (33, 16), (2, 1)]
)
@pytest.mark.parametrize("batch_size", [1, 3, 70])
def test_each_window_once_an_epoch(n: int, seq_len: int, batch_size: int):
    sampler = WindowSampler(TOKENS[:n], seq_len, seed=3)
    offset, count = sampler.offset, sampler.epoch_windows
    assert 0 <= offset < seq_len and count == (n - 1 - offset) // seq_len
    seen: list[int] = []
    while len(seen) < count:
        seen += starts(sampler.batch(batch_size)[0])
    assert sorted(seen[:count]) == [offset + i * seq_len for i in range(count)]
    expected = (
        count - 1
    ) // batch_size + 1  # batches drawn; a last one goes on into the next epoch
    assert len(seen) == expected * batch_size


def test_epochs_differ_and_seeds_differ():
    sampler = WindowSampler(TOKENS, 16, seed=1)
    epochs = []
    for _ in range(4):
        sampler._start_epoch(len(epochs))
        sampler.index = 0
        epochs.append(starts(sampler.batch(60)[0]))
    assert len({e[0] % 16 for e in epochs}) > 1  # offsets
    assert len({tuple(e) for e in epochs}) == 4
    assert starts(WindowSampler(TOKENS, 16, seed=2).batch(60)[0]) != epochs[0]
    assert starts(WindowSampler(TOKENS, 16, seed=1).batch(60)[0]) == epochs[0]


def test_order_is_the_same_on_every_platform():
    """Pinned: a change here would change the data order of every run that is resumed."""
    assert Permutation(10, key=0)(np.arange(10)).tolist() == [2, 9, 0, 7, 6, 8, 3, 5, 4, 1]
    sampler = WindowSampler(TOKENS, 100, seed=1337)
    assert [starts(sampler.batch(3)[0]) for _ in range(4)] == [
        [246, 346, 46],
        [646, 546, 846],
        [746, 146, 446],
        [804, 4, 604],
    ]


@pytest.mark.parametrize("consumed", [0, 1, 7, 20, 61])
def test_resume_is_exact(consumed: int):
    whole = WindowSampler(TOKENS, 16, seed=5)
    for _ in range(consumed):
        whole.batch(3)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = WindowSampler(TOKENS, 16, seed=5)
    resumed.batch(2)  # where it stood before does not matter
    resumed.load_state_dict(state)
    for _ in range(50):  # over the ends of epochs
        for a, b in zip(whole.batch(3), resumed.batch(3), strict=True):
            assert torch.equal(a, b)
    assert whole.state_dict() == resumed.state_dict()


def test_resume_refuses_other_data():
    state = WindowSampler(TOKENS, 16, seed=5).state_dict()
    for other, name in [
        (WindowSampler(TOKENS[:-1], 16, seed=5), "num_tokens = 1000, this run has 999"),
        (WindowSampler(TOKENS, 8, seed=5), "seq_len"),
        (WindowSampler(TOKENS, 16, seed=6), "seed"),
    ]:
        with pytest.raises(ValueError, match=name):
            other.load_state_dict(state)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_see_the_single_process_order(world_size: int):
    single = WindowSampler(TOKENS, 16, seed=9)
    ranks = [
        WindowSampler(TOKENS, 16, seed=9, rank=r, world_size=world_size) for r in range(world_size)
    ]
    for _ in range(60):
        inputs, targets = single.batch(2 * world_size)
        shards = [rank.batch(2) for rank in ranks]
        assert torch.equal(torch.cat([shard[0] for shard in shards]), inputs)
        assert torch.equal(torch.cat([shard[1] for shard in shards]), targets)
        assert all(rank.state_dict() == single.state_dict() for rank in ranks)
    # four ranks' position continues on one process
    resumed = WindowSampler(TOKENS, 16, seed=9)
    resumed.load_state_dict(ranks[-1].state_dict())
    assert torch.equal(resumed.batch(5)[0], single.batch(5)[0])


def test_accumulation_sees_the_same_windows_as_one_batch():
    one, accumulated = WindowSampler(TOKENS, 16), WindowSampler(TOKENS, 16)
    micro = torch.cat([accumulated.batch(2)[0] for _ in range(4)])
    assert torch.equal(micro, one.batch(8)[0])


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 100, 4097, 100_003])
def test_permutation_is_one(n: int):
    entries = Permutation(n, key=n)(np.arange(n))
    assert np.array_equal(np.sort(entries), np.arange(n))


def test_permutation_looks_random():
    n = 100_003
    entries = Permutation(n, key=1)(np.arange(n))
    assert abs(np.corrcoef(entries, np.arange(n))[0, 1]) < 0.02
    assert abs(np.corrcoef(entries[1:], entries[:-1])[0, 1]) < 0.02
    # how often each position lands in each of 10 bands, for 4,000 keys: chi-square, 81 free values
    hits = np.zeros((10, 10))
    for key in range(4000):
        hits[np.arange(10), Permutation(10, key)(np.arange(10))] += 1
    assert ((hits - 400) ** 2 / 400).sum() < 130  # p = 0.0005


def test_permutation_of_many_windows_takes_no_memory():
    entries = Permutation(10**12, key=0)(np.array([0, 1, 10**12 - 1]))
    assert len(set(entries.tolist())) == 3 and entries.max() < 10**12


def test_eval_batches():
    batches = list(eval_batches(TOKENS, 16, 20))
    assert [len(inputs) for inputs, _ in batches] == [20, 20, 20, 2]
    joined = torch.cat([inputs for inputs, _ in batches])
    assert starts(joined) == list(range(0, 992, 16))
    assert all(torch.equal(targets, inputs + 1) for inputs, targets in batches)
    some = torch.cat([inputs for inputs, _ in eval_batches(TOKENS, 16, 20, max_windows=31)])
    assert starts(some) == list(range(0, 992, 32))
    assert sum(len(i) for i, _ in eval_batches(TOKENS, 16, 20, max_windows=999)) == 62


def test_errors():
    with pytest.raises(ValueError, match=r"16 tokens, too few .* 17"):
        WindowSampler(TOKENS[:16], 16)
    with pytest.raises(ValueError, match="too few"):
        list(eval_batches(TOKENS[:16], 16, 1))
    with pytest.raises(ValueError, match="seq_len"):
        WindowSampler(TOKENS, 0)
    with pytest.raises(ValueError, match="batch_size"):
        WindowSampler(TOKENS, 4).batch(0)
    for rank, world_size in [(2, 2), (-1, 2), (0, 0)]:
        with pytest.raises(ValueError, match="rank"):
            WindowSampler(TOKENS, 4, rank=rank, world_size=world_size)
