"""TrainConfig: everything that decides a training run, and how it is read from TOML and JSON.

The same names everywhere: a flag --model.n-layer is n_layer in the table [model] of a TOML file,
and config["model"]["n_layer"] in a run's config.json.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from .gpt import GPTConfig

PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]
OptimizerName = Literal["adamw", "muon"]
ScheduleName = Literal["cosine", "wsd"]


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, how, and what to keep. Raises ValueError for what can't be run."""

    # The comment beside a field is its help on the command line.
    data: Path = Path("data/cache/shakespeare-char")  # dataset folder, made by `fastattn prepare`
    out: Path = Path("runs/train")  # run folder, made if absent
    model: GPTConfig = dataclasses.field(default_factory=GPTConfig)
    """vocab_size and eos_token_id are set to the tokenizer's."""

    # --- batch
    seq_len: int | None = None  # T, tokens in a window; None = model.block_size
    batch_size: int = 16  # windows at a time (a micro-batch): what fits in memory
    tokens_per_step: int | None = None  # accumulates micro-batches up to this; None = one of them

    # --- length
    steps: int = 2000  # optimizer steps
    max_minutes: float | None = None  # as many of `steps` as fit, timed under way

    # --- optimizer
    optimizer: OptimizerName = "adamw"  # muon: for the blocks' matrices, adamw for the rest
    lr: float = 1e-3  # AdamW's peak learning rate
    muon_lr: float = 0.02  # Muon's peak learning rate
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.99  # AdamW's decay of the mean squared gradient
    muon_momentum: float = 0.95  # Muon's decay of the mean gradient
    weight_decay: float = 0.1  # decoupled; of matrices and embeddings
    clip: float = 1.0  # largest norm of all gradients together; 0 = no clipping

    # --- schedule: linear from 0 to the peak, then
    schedule: ScheduleName = "cosine"  # half a cosine; or wsd: the peak, then a linear fall
    warmup_steps: int = 100  # to the peak
    decay: float = 0.5  # wsd: the share of the steps in which the rate falls
    final_lr: float = 0.1  # the rate at the end, as a share of the peak

    # --- numbers
    seed: int = 1337  # of weights, order of data, dropout and samples
    # bf16 and fp16: autocast, weights in fp32
    precision: PrecisionName = "auto"  # auto = the fastest on the device
    device: str = "auto"  # cpu, cuda, cuda:1, …; auto = cuda if there is one
    backend: str | None = None  # of attention and loss: cpu, reference; None = the best usable

    # --- what to watch and keep
    eval_every: int = 250  # steps between evaluations; 0 = only at the end
    eval_tokens: int = 51200  # of the validation split, always the same ones; 0 = all
    sample_every: int = 0  # steps between samples of text; 0 = none
    sample_tokens: int = 200  # length of a sample
    sample_prompt: str = "The"  # what a sample continues
    checkpoint_every: int = 500  # steps between checkpoints; 0 = only at the end
    keep_checkpoints: int = 2  # older ones are removed
    tensorboard: bool = False  # also write TensorBoard events
    plot: bool = True  # draw loss.png at the end

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, self, name, "at least 1")
        for name in ("eval_every", "eval_tokens", "sample_every", "sample_tokens", "clip"):
            _require(getattr(self, name) >= 0, self, name, "at least 0")
        for name in ("lr", "muon_lr", "weight_decay", "warmup_steps", "checkpoint_every"):
            _require(getattr(self, name) >= 0, self, name, "at least 0")
        for name in ("beta1", "beta2", "muon_momentum"):
            _require(0 <= getattr(self, name) < 1, self, name, "in [0, 1)")
        for name in ("decay", "final_lr"):
            _require(0 <= getattr(self, name) <= 1, self, name, "in [0, 1]")
        _require(
            self.max_minutes is None or self.max_minutes > 0, self, "max_minutes", "more than 0"
        )
        within = f"from 1 to model.block_size {self.model.block_size}"
        _require(1 <= self.T <= self.model.block_size, self, "seq_len", within)
        _ = self.accumulation

    @property
    def T(self) -> int:
        return self.model.block_size if self.seq_len is None else self.seq_len

    @property
    def eval_windows(self) -> int | None:
        """How many windows an evaluation covers; None = all."""
        return max(1, self.eval_tokens // self.T) if self.eval_tokens else None

    @property
    def accumulation(self) -> int:
        """Micro-batches a step. ValueError, with the nearest valid values, if it isn't whole."""
        micro = self.batch_size * self.T
        tokens = micro if self.tokens_per_step is None else self.tokens_per_step
        if tokens < micro or tokens % micro:
            below = max(tokens // micro, 1) * micro
            near = below if tokens - below < micro / 2 else below + micro
            raise ValueError(
                f"tokens_per_step {tokens} is not a multiple of batch_size · seq_len = "
                f"{self.batch_size} · {self.T} = {micro}; the nearest is {near}"
            )
        return tokens // micro


def _require(ok: bool, config: TrainConfig, name: str, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} must be {allowed}, got {getattr(config, name)}")


# ---- dataclasses from dicts --------------------------------------------------------------------

T = TypeVar("T")
KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON values, nested as the config is."""
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in dataclasses.asdict(config).items()
    }


def merge(config: T, values: dict[str, Any], where: str, prefix: str = "") -> T:
    """`config` with the fields in `values` replaced; nested dicts go into nested configs.

    ValueError, beginning with `where`, for an unknown key (with the closest known one) or a value
    of the wrong type.
    """
    hints = typing.get_type_hints(type(config))
    changes: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in hints:
            close = difflib.get_close_matches(name, hints, n=1)
            hint = f"; did you mean {prefix}{close[0]}?" if close else ""
            raise ValueError(f"{where}: unknown key {prefix}{key}{hint}")
        current = getattr(config, name)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {prefix}{key} must be a table, got {value!r}")
            changes[name] = merge(current, value, where, f"{prefix}{key}.")
        else:
            changes[name] = _typed(value, hints[name], f"{where}: {prefix}{key}")
    try:
        return dataclasses.replace(config, **changes)  # type: ignore[type-var]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _typed(value: Any, hint: Any, name: str) -> Any:
    """`value` as the type that `hint` says: int, float, bool, str, Path, Literal or a union."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        if value in options:
            return value
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None and types.NoneType in options:
            return None
        (hint,) = (option for option in options if option is not types.NoneType)
    accepted = {float: (int, float), Path: (str, Path)}.get(hint, (hint,))
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        kind = KINDS.get(hint, hint.__name__)
        raise ValueError(f"{name} must be {kind}, got {value!r}")
    return hint(value)


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's content; ValueError names the file if it isn't there or isn't TOML."""
    if not path.is_file():
        raise ValueError(f"no file {path}")
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError:
            raise ImportError(
                "--config needs tomli on Python 3.10: pip install 'fastattn[train]'"
            ) from None
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
