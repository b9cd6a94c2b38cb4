"""Batches of windows of tokens, in a random order that needs no memory and can be resumed exactly.

`WindowSampler` draws windows of T + 1 tokens (T inputs, T targets one further) without replacement.
Its order is a formula of (seed, epoch, index), so its whole state is those numbers: a checkpoint
stores them, and every rank holds the same ones. `eval_batches` goes through all windows in order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]  # inputs, targets: both (B, T) int64


def _windows(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> Batch:
    """Windows of seq_len + 1 tokens at `starts` (B,) -> inputs and targets, (B, T) int64."""
    windows = np.lib.stride_tricks.sliding_window_view(tokens, seq_len)  # (N - T + 1, T), no copy
    inputs, targets = windows[starts], windows[starts + 1]
    return torch.from_numpy(inputs.astype(np.int64)), torch.from_numpy(targets.astype(np.int64))


def check_length(num_tokens: int, seq_len: int, where: str = "the split") -> None:
    """ValueError unless at least one window fits."""
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, got {seq_len}")
    if num_tokens < seq_len + 1:
        raise ValueError(
            f"{where} has {num_tokens} tokens, too few for one window of seq_len + 1 = "
            f"{seq_len + 1}: use more text or a shorter seq_len"
        )


class WindowSampler:
    """Batches of windows, each window once an epoch, in an order set by the seed.

    An epoch lays windows of T + 1 tokens end to end, the last token of one being the first of the
    next, so every token is a target once. It begins at a random offset below T, so windows differ
    between epochs; then it visits them in a random order. Nothing is stored but (epoch, index).

    tokens       (N,) integer array, usually TokenDataset(...).tokens
    seq_len      T
    rank, world_size
                 each step takes world_size · B windows of the one global order, rank r the r-th B
                 of them: N ranks together see what one process with the N-fold batch sees, and a
                 position saved by 4 ranks can be resumed by 1
    """

    def __init__(
        self,
        tokens: np.ndarray,
        seq_len: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        check_length(len(tokens), seq_len)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size = {world_size}), got {rank}")
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.rank, self.world_size = rank, world_size
        self.index = 0  # windows of this epoch that all ranks together have taken
        self._start_epoch(0)

    def _start_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        key = _key(self.seed, epoch)
        self.offset = key % min(self.seq_len, len(self.tokens) - self.seq_len)
        self.epoch_windows = (len(self.tokens) - 1 - self.offset) // self.seq_len
        self._order = Permutation(self.epoch_windows, key)

    def _take(self, count: int) -> np.ndarray:
        """Start tokens (count,) of the next windows in the global order, over epoch ends."""
        parts = []
        while count:
            if self.index == self.epoch_windows:
                self._start_epoch(self.epoch + 1)
                self.index = 0
            n = min(count, self.epoch_windows - self.index)
            order = self._order(np.arange(self.index, self.index + n))
            parts.append(self.offset + order * self.seq_len)
            self.index += n
            count -= n
        return np.concatenate(parts)

    def batch(self, batch_size: int) -> Batch:
        """The next (B, T) int64 inputs and targets of this rank."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        starts = self._take(batch_size * self.world_size)
        mine = starts[self.rank * batch_size : (self.rank + 1) * batch_size]
        return _windows(self.tokens, mine, self.seq_len)

    def state_dict(self) -> dict[str, int]:
        """The position, the same on every rank, as JSON values."""
        return {
            "epoch": self.epoch,
            "index": self.index,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "num_tokens": len(self.tokens),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a saved position; ValueError if it is one of other data, seq_len or seed."""
        for name, mine in self.state_dict().items():
            if name not in ("epoch", "index") and state[name] != mine:
                raise ValueError(
                    f"the saved data position has {name} = {state[name]}, this run has {mine}: "
                    "it cannot be continued exactly"
                )
        self._start_epoch(state["epoch"])
        self.index = state["index"]


def eval_batches(
    tokens: np.ndarray, seq_len: int, batch_size: int, max_windows: int | None = None
) -> Iterator[Batch]:
    """The same batches each time: all windows of seq_len + 1 tokens laid end to end, in order.

    With max_windows, that many of them, evenly spread. The last batch may be smaller.
    """
    check_length(len(tokens), seq_len)
    count = (len(tokens) - 1) // seq_len
    chosen = np.arange(count)
    if max_windows is not None and max_windows < count:
        chosen = np.arange(max_windows) * count // max_windows
    for start in range(0, len(chosen), batch_size):
        yield _windows(tokens, chosen[start : start + batch_size] * seq_len, seq_len)


# ---- a random order without memory -------------------------------------------------------------


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64: uint64 -> uint64 that look random, one to one.

    Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(*values: int) -> int:
    """Integers -> one 64-bit key."""
    key = 0
    for value in values:
        key = int(mix(np.array([(key + value) % 2**64], np.uint64))[0])
    return key


class Permutation:
    """A random permutation of range(n), computed entry by entry.

    A Feistel network on pairs (left, right) in range(a) × range(b), with a·b a little above n: each
    round adds a hash of one half to the other. An entry that falls outside range(n) goes through
    again until it is inside ("cycle walking"; both from Black and Rogaway 2002).
    """

    ROUNDS = 6  # 4 make a strong pseudorandom permutation (Luby and Rackoff); 2 more cost little

    def __init__(self, n: int, key: int):
        self.n = n
        self.a = math.isqrt(n - 1) + 1  # ⌈√n⌉
        self.b = -(-n // self.a)  # a·b < n + a
        self.round_keys = [np.uint64(_key(key, r)) for r in range(self.ROUNDS)]

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Entries (m,) int64 at `index` (m,), integers in range(n)."""
        x = self._network(index.astype(np.uint64))
        while (outside := x >= np.uint64(self.n)).any():
            x[outside] = self._network(x[outside])
        return x.astype(np.int64)

    def _network(self, x: np.ndarray) -> np.ndarray:
        a, b = np.uint64(self.a), np.uint64(self.b)
        left, right = np.divmod(x, b)
        for even, odd in zip(self.round_keys[::2], self.round_keys[1::2], strict=True):
            left = (left + mix(right ^ even) % a) % a
            right = (right + mix(left ^ odd) % b) % b
        return left * b + right
