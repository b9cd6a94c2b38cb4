"""The commands with options: each a dataclass, whose comments are the help, and a function."""

from __future__ import annotations

import argparse
import difflib
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro
from tyro.conf import Positional

from . import trainer
from .config import TrainConfig, merge, read_toml, to_dict
from .data import SOURCES, TokenDataset
from .data import prepare as prepare_dataset
from .demo import demo as run_demo
from .generate import stream
from .presets import PRESETS, SUMMARIES
from .sampler import eval_batches

T = TypeVar("T")


def parse(
    command: type[T], name: str, argv: list[str], *, default: T | None = None, more: str = ""
) -> T:
    description = textwrap.dedent(f"    {command.__doc__}") + more
    parsed = tyro.cli(
        command, prog=f"fastattn {name}", description=description, args=argv, default=default
    )
    assert parsed is not None
    return parsed


# ---- prepare -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepare:
    """Turn text into a dataset folder: train.bin, val.bin, tokenizer.json, meta.json."""

    sources: Positional[tuple[str, ...]]  # shakespeare (bundled), pystdlib, or text files
    tokenizer: Literal["char", "byte", "bpe"] = "char"  # bpe: GPT-2's byte pairs
    out: Path | None = None  # the folder; None = data/cache/<source>-<tokenizer>
    val_fraction: float | None = None  # of the text, at its end; None = 0.1, or four whole plays
    force: bool = False  # replace another dataset in the folder


def prepare(argv: list[str]) -> None:
    c = parse(Prepare, "prepare", argv)
    if not c.sources:
        raise ValueError(f"give text files, or one of {', '.join(SOURCES)}")
    named = len(c.sources) == 1 and c.sources[0] in SOURCES
    source = c.sources[0] if named else c.sources
    folder = c.out or Path("data/cache") / f"{Path(c.sources[0]).stem}-{c.tokenizer}"
    meta = prepare_dataset(source, c.tokenizer, folder, val_fraction=c.val_fraction, force=c.force)
    train, val = (meta["splits"][split]["tokens"] for split in ("train", "val"))
    print(
        f"{folder}: {train:,} tokens for training, {val:,} for validation, "
        f"{meta['vocab_size']:,} in the {meta['tokenizer']} vocabulary\n"
        f"train on it: fastattn train --data {folder}"
    )


# ---- train -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Train:
    """Train a GPT on a dataset folder made by `fastattn prepare`.

    What no flag says comes from the --config file, what that doesn't say from the --preset, or
    with --resume from the run. The file is TOML: steps = 500, and n_layer = 6 under [model].

    Presets:
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    preset: str = "demo"  # the recipe to start from
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None  # a TOML file
    resume: Path | None = None  # the folder of a run to go on with, bit for bit
    overwrite: bool = False  # remove the run that is in --out


def train(argv: list[str]) -> None:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, kind in (("preset", str), ("config", Path), ("resume", Path)):
        first.add_argument(f"--{name}", type=kind)
    known, _ = first.parse_known_args(argv)

    base = trainer.read_config(known.resume) if known.resume else preset(known.preset or "demo")
    if known.config:
        base = merge(base, read_toml(known.config), str(known.config))
    presets = "\n".join(f"  {name:<13}{summary}" for name, summary in SUMMARIES.items())
    default = Train(base, preset=known.preset or "demo")
    c = parse(Train, "train", argv, default=default, more=presets)
    if c.resume:
        for change in changes(to_dict(trainer.read_config(c.resume)), to_dict(c.config)):
            print(f"not as before: {change}")
    trainer.train(c.config, resume=c.resume is not None, overwrite=c.overwrite)


def preset(name: str) -> TrainConfig:
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(PRESETS)}"
        raise ValueError(f"no preset {name!r}{hint}")
    return PRESETS[name]


def changes(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """The entries that differ, as "name: old → new"."""
    lines = []
    for key, old in before.items():
        new = after[key]
        if isinstance(old, dict):
            lines += changes(old, new, f"{prefix}{key}.")
        elif new != old:
            lines.append(f"{prefix}{key}: {old} → {new}")
    return lines


# ---- eval, generate, export --------------------------------------------------------------------


@dataclass(frozen=True)
class Eval:
    """The exact loss of a trained model: every token of a split counts once.

    The split is cut into windows of the model's context laid end to end, as for the losses printed
    in training.
    """

    folder: Positional[Path]  # a run, or a model in Hugging Face's GPT-2 layout
    data: Path | None = None  # the dataset folder; None = the run's own
    split: Literal["val", "train"] = "val"
    seq_len: int | None = None  # tokens in a window; None = the run's, or the whole context
    batch_size: int = 16  # windows at a time
    backend: str | None = None  # of attention and loss; None = the best usable


def evaluate(argv: list[str]) -> None:
    c = parse(Eval, "eval", argv)
    model, _ = trainer.load_model(c.folder)
    run = trainer.read_config(c.folder) if trainer.is_run(c.folder) else None
    data = c.data or (run.data if run else None)
    if data is None:
        raise ValueError(f"{c.folder} is no run that knows its dataset: give --data")
    tokens = TokenDataset(data, c.split)
    if tokens.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{data} has a vocabulary of {tokens.vocab_size}, the model {model.config.vocab_size}"
        )
    seq_len = c.seq_len or (run.T if run else model.config.block_size)
    loss = trainer.mean_loss(
        model, eval_batches(tokens.tokens, seq_len, c.batch_size), backend=c.backend
    )
    count = (len(tokens) - 1) // seq_len * seq_len
    print(
        f"{c.split} loss {loss:.4f} nats a token, {loss / math.log(2):.4f} bits, perplexity "
        f"{math.exp(loss):.3f}, over {count:,} tokens in windows of {seq_len}"
    )


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with a trained model."""

    folder: Positional[Path]  # a run, or a model in Hugging Face's GPT-2 layout
    prompt: str = "\n"  # what the text begins with
    max_new_tokens: int = 500
    temperature: float = 0.8  # 0 takes the likeliest token, 1 samples the model's distribution
    top_k: int | None = None  # sample from the k likeliest tokens only
    top_p: float | None = None  # from the fewest likeliest ones whose probabilities reach p
    num_samples: int = 1  # texts to make
    seed: int | None = None  # same seed, same text; None = another one each time
    backend: str | None = None  # of attention; None = the best usable


def generate(argv: list[str]) -> None:
    c = parse(Generate, "generate", argv)
    model, tokenizer = trainer.load_model(c.folder)
    prompt = tokenizer.encode(c.prompt)
    if not prompt:
        raise ValueError("--prompt must have at least one token")
    for number in range(c.num_samples):
        if number:
            print("\n" + "-" * 80)
        steps = stream(
            model,
            torch.tensor([prompt]),
            max_new_tokens=c.max_new_tokens,
            temperature=c.temperature,
            top_k=c.top_k,
            top_p=c.top_p,
            seed=None if c.seed is None else c.seed + number,
            backend=c.backend,
        )
        print(c.prompt, end="")
        pending: list[int] = []  # a character of several tokens is U+FFFD until the last has come
        for token in steps:
            pending.append(int(token))
            text = tokenizer.decode(pending)
            if not text.endswith("\ufffd"):
                print(text, end="", flush=True)
                pending = []
        print(tokenizer.decode(pending))


@dataclass(frozen=True)
class Export:
    """Write a trained model as config.json and model.safetensors, in Hugging Face's GPT-2 layout.

    transformers reads what has GPT-2's architecture; fastattn reads all (`GPT.from_pretrained`).
    """

    folder: Positional[Path]  # a run
    out: Path | None = None  # the folder to write; None = <run>/export


def export(argv: list[str]) -> None:
    c = parse(Export, "export", argv)
    model, tokenizer = trainer.load_model(c.folder)
    out = c.out or c.folder / "export"
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(out))
    tokenizer.save(out)
    print(f"{out}: {model.num_params():,} parameters")


# ---- demo --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Demo:
    """Check the kernels, train for three minutes, compare with the reference path, sample text."""

    out: Path = Path("runs/demo")  # the run folder; a run that is there is replaced
    minutes: float = 3.0  # of training


def demo(argv: list[str]) -> None:
    c = parse(Demo, "demo", argv)
    run_demo(c.out, c.minutes)


COMMANDS = {
    "prepare": prepare,
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "export": export,
    "demo": demo,
}
