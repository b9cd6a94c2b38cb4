"""Named recipes: the starting points of `fastattn train --preset NAME`."""

from __future__ import annotations

from pathlib import Path

from .config import TrainConfig
from .gpt import GPTConfig

PRESETS: dict[str, TrainConfig] = {
    "demo": TrainConfig(
        out=Path("runs/demo"),
        model=GPTConfig(
            block_size=128,
            n_layer=4,
            n_head=2,
            n_embd=128,
            norm="layernorm",
            mlp="relu2",
            position="rope",
            qk_norm=True,
            bias=False,
        ),
        batch_size=16,
        steps=10_000,
        max_minutes=3.0,
        optimizer="muon",
        lr=3e-3,
        muon_lr=0.02,
        beta2=0.95,
        schedule="wsd",
        warmup_steps=30,
        decay=0.6,
        final_lr=0.0,
        eval_every=500,
        checkpoint_every=0,
    ),
    # nanoGPT's recipe for a laptop's CPU, as its README has it.
    "nanogpt-cpu": TrainConfig(
        out=Path("runs/nanogpt-cpu"),
        model=GPTConfig(block_size=64, n_layer=4, n_head=4, n_embd=128, bias=False),
        batch_size=12,
        steps=2000,
        optimizer="adamw",
        lr=1e-3,
        beta2=0.99,
        weight_decay=0.1,
        clip=1.0,
        schedule="cosine",
        warmup_steps=100,
        final_lr=0.1,
    ),
    # GPT-2 small's shape and nanoGPT's schedule for it: 491,520 tokens a step.
    "gpt2-small": TrainConfig(
        out=Path("runs/gpt2-small"),
        data=Path("data/cache/shakespeare-bpe"),
        model=GPTConfig(),
        batch_size=1,
        tokens_per_step=480 * 1024,
        steps=600_000,
        optimizer="adamw",
        lr=6e-4,
        beta2=0.95,
        schedule="cosine",
        warmup_steps=2000,
        final_lr=0.1,
        eval_every=1000,
        checkpoint_every=1000,
    ),
}

SUMMARIES = {
    "demo": "the default: a modern small GPT on Shakespeare's characters, in three minutes",
    "nanogpt-cpu": "nanoGPT's recipe for a CPU: 4 layers of width 128, T = 64, 2,000 steps",
    "gpt2-small": "GPT-2 small (124 M parameters) on GPT-2's byte pairs",
}
