"""Train on sequences of different lengths without padding: attention_varlen and a fused loss.

    python examples/packed_training.py

The task is to repeat: each sequence is a random phrase, again and again. The first time it can't be
guessed, from the second on it can, by a model that looks back. Sequences lie one behind the other
in one tensor, (tokens, …), and `cu_seqlens` says where each begins; positions begin anew with each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn

VOCAB, WIDTH, HEADS, LONGEST = 32, 64, 4, 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.expand, self.shrink = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).unbind(1)  # (T, H, D)
        out = fastattn.attention_varlen(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True
        )
        x = x + self.project(out.flatten(1))
        return x + self.shrink(F.gelu(self.expand(self.norms[1](x))))


class Model(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        lengths = cu_seqlens.diff()
        first = torch.repeat_interleave(cu_seqlens[:-1], lengths)
        x = self.tokens(tokens) + self.positions(torch.arange(len(tokens)) - first)
        for block in self.blocks:
            x = block(x, cu_seqlens, longest)
        return fastattn.linear_cross_entropy(self.norm(x), self.head.weight, targets)


def draw(sequences: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Packed tokens and targets (T,), cu_seqlens (sequences + 1,) int32 and the longest length."""
    rows, targets = [], []
    for length in torch.randint(8, LONGEST, (sequences,)).tolist():
        phrase = torch.randint(VOCAB, (int(torch.randint(2, 6, ())),))
        row = phrase.repeat(length // len(phrase) + 2)[: length + 1]
        rows.append(row[:-1])
        target = row[1:].clone()
        target[: len(phrase) - 1] = -100  # what can't be known isn't asked
        targets.append(target)
    lengths = torch.tensor([len(row) for row in rows])
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
    return torch.cat(rows), torch.cat(targets), cu_seqlens, int(lengths.max())


def main(quick: bool = False) -> list[float]:
    """The losses on the way."""
    torch.manual_seed(0)
    model = Model()
    steps, sequences = (60, 8) if quick else (300, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        loss = model(*draw(sequences))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % (steps // 10) == 0:
            print(f"step {step:4d}  loss {losses[-1]:.3f}")
    print(f"the end    loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
