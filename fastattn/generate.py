"""Text generation: prefill of the prompts, then one token a step against a KV cache.

Prompts of different length come padded on the left. Inside, every row starts at slot 0 and the
padding goes to its end, where causal attention does not look; a row's length says where it
continues. So a row is computed as it would be alone: no mask, and positions count from its start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .modules import KVCache, check_tokens

if TYPE_CHECKING:
    from .gpt import GPT


def generate(
    model: GPT,
    idx: Tensor,
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    attention_mask: Tensor | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    use_cache: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Continues the prompts idx (B, S) int64; returns (B, S + new tokens).

    `temperature` samples: transformers ignores it, and decodes greedily, unless do_sample=True.
    Here 0 is greedy, 1 the model's own distribution.

    A context may outgrow block_size: a row of block_size tokens goes on with its last half as
    context, its positions counted anew.

    Args:
        max_new_tokens, max_length: one of them; max_length counts the prompt, padding included.
        temperature: the logits are divided by it, before top_k and top_p.
        top_k: sample from the k likeliest tokens.
        top_p: sample from the fewest likeliest tokens whose probabilities reach p (Holtzman et
            al., "The Curious Case of Neural Text Degeneration", 2020).
        seed: same seed, same tokens; None draws from torch's global generator.
        attention_mask: (B, S), 0 where idx is padding, which must be on the left.
        eos_token_id: a row ends after one of these; None takes the config's, () is none. Output
            ends when all rows have.
        pad_token_id: what follows in a row that has ended; None repeats the first eos_token_id.
        use_cache: False computes the whole context at every step, for the same tokens.
        backend: as in `attention`.

    Raises:
        TypeError, ValueError: for arguments out of range and masks that pad on the right.
    """
    tokens = stream(
        model,
        idx,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        attention_mask=attention_mask,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        use_cache=use_cache,
        backend=backend,
    )
    return torch.cat([idx, *(token[:, None] for token in tokens)], dim=1)


def stream(
    model: GPT,
    idx: Tensor,
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    attention_mask: Tensor | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    use_cache: bool = True,
    backend: str | None = None,
) -> Iterator[Tensor]:
    """As `generate`, but yields each step's tokens (B,) as they come.

    Arguments are checked by the call itself, not by the first step. The model is in eval mode
    until the iterator ends or is closed.
    """
    check_tokens(idx)
    steps = _new_tokens(idx.shape[1], max_new_tokens, max_length)
    sampler = _Sampler(temperature, top_k, top_p, seed, idx.device)
    eos = model.config.eos_token_id if eos_token_id is None else eos_token_id
    stops = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    pad = pad_token_id if pad_token_id is not None else stops[0] if stops else 0
    context = _Context(model, idx, attention_mask, steps, use_cache, backend)
    return _steps(context, sampler, steps, stops, pad)


def _steps(
    context: _Context, sampler: _Sampler, steps: int, stops: list[int], pad: int
) -> Iterator[Tensor]:
    model, was_training = context.model, context.model.training
    model.eval()
    try:
        stop_tokens = torch.tensor(stops, dtype=torch.int64, device=context.tokens.device)
        ended: Tensor | None = None  # (B,) bool
        for _ in range(steps):
            with torch.no_grad():
                token = sampler(context.next_logits())
                if stops:
                    if ended is not None:
                        token = token.masked_fill(ended, pad)
                    hit = torch.isin(token, stop_tokens)
                    ended = hit if ended is None else ended | hit
                context.append(token)
            yield token
            if ended is not None and bool(ended.all()):
                return
    finally:
        model.train(was_training)


class _Context:
    """The rows' tokens, which of them the model still sees, and the cache that holds those."""

    def __init__(
        self,
        model: GPT,
        idx: Tensor,
        attention_mask: Tensor | None,
        steps: int,
        use_cache: bool,
        backend: str | None,
    ) -> None:
        B, S = idx.shape
        self.model = model
        self.backend = backend
        self.lengths = _prompt_lengths(idx, attention_mask)  # on the host: a step needs no sync
        self.starts = [0] * B  # each row's first token in the context
        self.rows = torch.arange(B, device=idx.device)
        self.tokens = idx.new_zeros(B, max(self.lengths, default=0) + steps)  # rows start at 0
        for b, length in enumerate(self.lengths):
            self.tokens[b, :length] = idx[b, S - length :]
        self.last = self.tokens[:, 0]  # (B,) the newest tokens
        self.use_cache = use_cache
        self.cache: KVCache | None = None

    def next_logits(self) -> Tensor:
        """(B, V): of the token that comes next."""
        starts = self._starts_within_block()
        if self.cache is None or starts != self.starts:
            self.starts = starts
            hidden = self._prefill()
        else:
            hidden = self.model.hidden(self.last[:, None], self.cache, backend=self.backend)[:, 0]
        return self.model.logits(hidden, backend=self.backend)

    def append(self, token: Tensor) -> None:
        self.last = token
        index = torch.tensor(self.lengths, device=token.device)
        self.tokens[self.rows, index] = token
        self.lengths = [length + 1 for length in self.lengths]

    def _starts_within_block(self) -> list[int]:
        block_size = self.model.config.block_size
        kept = max(1, block_size // 2)
        return [
            length - kept if length - start > block_size else start
            for start, length in zip(self.starts, self.lengths, strict=True)
        ]

    def _prefill(self) -> Tensor:
        """Computes all of the context; returns the hidden state (B, C) of each row's last token."""
        seen = [n - start for start, n in zip(self.starts, self.lengths, strict=True)]
        device = self.tokens.device
        index = torch.tensor(self.starts, device=device)[:, None]
        index = index + torch.arange(
            max(seen), device=device
        )  # past a row's end: any tokens will do
        context = self.tokens.gather(1, index.clamp(max=self.tokens.shape[1] - 1))
        if self.cache is not None:
            self.cache.truncate([0] * len(seen))
        elif self.use_cache:
            max_seqlen = min(self.tokens.shape[1], self.model.config.block_size)
            self.cache = self.model.new_cache(len(seen), max_seqlen)
        hidden = self.model.hidden(context, self.cache, backend=self.backend)
        if self.cache is not None:
            self.cache.truncate(seen)
        return hidden[self.rows, torch.tensor(seen, device=device) - 1]


class _Sampler:
    """Logits (B, V) to tokens (B,)."""

    def __init__(
        self,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        seed: int | None,
        device: torch.device,
    ) -> None:
        if temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.generator = None
        if seed is not None:
            self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kth = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        probabilities = logits.softmax(dim=-1)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True)
            before = ordered.cumsum(dim=-1) - ordered  # the sum of all likelier ones
            probabilities = torch.zeros_like(ordered).scatter(
                -1, order, ordered.masked_fill(before >= self.top_p, 0.0)
            )
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]


def _new_tokens(prompt: int, max_new_tokens: int | None, max_length: int | None) -> int:
    if (max_new_tokens is None) == (max_length is None):
        raise ValueError("give one of max_new_tokens and max_length")
    steps = max_new_tokens if max_length is None else max_length - prompt
    assert steps is not None
    if steps < 0:
        raise ValueError(f"{steps} new tokens asked for, after a prompt of {prompt}")
    return steps


def _prompt_lengths(idx: Tensor, attention_mask: Tensor | None) -> list[int]:
    """The tokens in each row behind its padding."""
    if attention_mask is None:
        mask = torch.ones_like(idx, dtype=torch.bool)
    elif attention_mask.shape == idx.shape:
        mask = attention_mask.bool()
    else:
        raise ValueError(
            f"attention_mask must have idx's shape {tuple(idx.shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ValueError("attention_mask must pad on the left: 0s, then 1s, in each row")
    lengths = mask.sum(dim=1).tolist()
    if min(lengths, default=1) < 1:
        raise ValueError("every prompt must have at least one token")
    return lengths
