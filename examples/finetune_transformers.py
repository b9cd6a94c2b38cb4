"""Fine-tunes a GPT-2 of Hugging Face's transformers with its Trainer, on fastattn and on sdpa.

    python examples/finetune_transformers.py                    # a small random model, in a minute
    python examples/finetune_transformers.py --model FOLDER     # a checkpoint, with 50,257 tokens

Needs `pip install fastattn[train] transformers accelerate`; runs offline, on the bundled plays of
Shakespeare. The three lines that fastattn takes are marked.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor

from fastattn.data import TokenDataset, prepare
from fastattn.integrations.transformers import patch_loss, register  # 1
from fastattn.memory import peak_memory

ATTENTION = ("fastattn", "sdpa")


class Result(NamedTuple):
    attention: str
    seconds: list[float]  # of each step
    peak: int | None  # bytes above what the model takes
    loss: float  # of validation, afterwards

    def __str__(self) -> str:
        memory = "n/a" if self.peak is None else f"{self.peak / 2**20:,.0f} MiB"
        step = statistics.median(self.seconds[1:] or self.seconds)  # the first one allocates
        return f"{self.attention:<10}{step * 1e3:>9,.0f} ms{memory:>14}{self.loss:>18.4f}"


def main(arguments: list[str] | None = None) -> dict[str, Result]:
    o = options(arguments)
    transformers.logging.disable_progress_bar()
    register()  # 2
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare("shakespeare", "bpe", folder / "data")
        model = o.model or random_gpt2(folder / "model", o)
        results = {name: finetune(name, model, folder, o) for name in o.attention}
    print(f"{o.steps} steps of {o.batch} × {o.length} tokens")
    print(f"{'':<10}{'a step':>12}{'peak memory':>14}{'validation loss':>18}")
    print(*results.values(), sep="\n")
    return results


def finetune(attention: str, model_folder: Path, folder: Path, o: argparse.Namespace) -> Result:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_folder, attn_implementation=attention
    )
    if attention == "fastattn":
        patch_loss(model, logits=False)  # 3
    clock = Clock()
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=str(folder / "runs"),
            max_steps=o.steps,
            per_device_train_batch_size=o.batch,
            per_device_eval_batch_size=o.batch,
            learning_rate=5e-4,
            warmup_steps=o.steps // 10,
            prediction_loss_only=True,
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Blocks(TokenDataset(folder / "data", "train"), o.length),
        eval_dataset=Blocks(TokenDataset(folder / "data", "val"), o.length, at_most=8 * o.batch),
        callbacks=[clock],
    )
    peak = peak_memory(trainer.train, model.device)
    return Result(attention, clock.seconds, peak, trainer.evaluate()["eval_loss"])


class Blocks(torch.utils.data.Dataset):
    """The tokens of a split in blocks of one length."""

    def __init__(self, tokens: TokenDataset, length: int, at_most: int | None = None):
        self.tokens, self.length = tokens.tokens, length
        self.blocks = len(tokens) // length if at_most is None else at_most

    def __len__(self) -> int:
        return self.blocks

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        block = self.tokens[i * self.length : (i + 1) * self.length]
        ids = torch.from_numpy(block.astype("int64"))
        return {"input_ids": ids, "labels": ids}


class Clock(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_, **__):
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.start)


def random_gpt2(folder: Path, o: argparse.Namespace) -> Path:
    """A checkpoint as if downloaded: GPT-2's vocabulary on a few narrow layers."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_positions=o.length,
        n_layer=o.layers,
        n_head=o.width // 64,
        n_embd=o.width,
        attn_pdrop=o.dropout,
        embd_pdrop=o.dropout,
        resid_pdrop=o.dropout,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def options(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--model", type=Path, help="folder of a checkpoint with GPT-2's tokens")
    p.add_argument("--layers", type=int, default=4, help="of the random model")
    p.add_argument("--width", type=int, default=256, help="of the random model, in heads of 64")
    p.add_argument("--dropout", type=float, default=0.0, help="of the random model")
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    p.add_argument("--attention", nargs="+", choices=ATTENTION, default=list(ATTENTION))
    return p.parse_args(arguments)


if __name__ == "__main__":
    main()
