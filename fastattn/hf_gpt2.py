"""Checkpoints in Hugging Face's GPT-2 layout, without transformers.

A folder holds config.json and model.safetensors, or several model-0000i-of-0000n.safetensors with
model.safetensors.index.json. There, weights of linear layers are (in, out), those of transformers'
Conv1D; ours are (out, in) and are transposed on the way. A GPT that is no GPT-2 is stored alike,
with model_type "fastattn_gpt" and the fields of GPTConfig in config.json.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import read_json, replacing, safetensors_package, write_json, write_tensors

OWN_MODEL_TYPE = "fastattn_gpt"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

# GPTConfig's fields and values that make a GPT-2, and what config.json calls its sizes.
GPT2_ARCHITECTURE = {
    "norm": "layernorm",
    "mlp": "gelu",
    "position": "learned",
    "qk_norm": False,
    "bias": True,
    "attn_softcap": 0.0,
    "logit_softcap": 0.0,
    "window": -1,
}
GPT2_NAMES = {
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "n_inner": "n_inner",
    "norm_eps": "layer_norm_epsilon",
    "init_std": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
}
# GPT2Config's own defaults: old checkpoints leave such keys out.
GPT2_DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "eos_token_id": 50256,
}
# What GPTConfig can't express must have these values.
GPT2_REQUIRED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh form
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
CONV1D_WEIGHT = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # constants in old checkpoints
PREFIX = "transformer."  # of every name but the head's; absent where a GPT2Model was saved


# --- config.json ----------------------------------------------------------------------------------


def read_config(folder: str | os.PathLike[str], dropout: float | None = None) -> dict[str, Any]:
    """GPTConfig's fields for the checkpoint in `folder`; `dropout` replaces the stored rate.

    Raises FileNotFoundError if there is no such checkpoint, ValueError if it is no GPT-2 that
    GPTConfig can express.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"there is no folder {os.fspath(folder)!r}. Nothing is downloaded here; for a model of "
            "the Hugging Face hub first run, for example, "
            "`hf download openai-community/gpt2 --local-dir gpt2`"
        )
    path = Path(folder, CONFIG)
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG} in {os.fspath(folder)}")
    stored = read_json(path)
    model_type = stored.pop("model_type", None) if isinstance(stored, dict) else None
    if model_type == OWN_MODEL_TYPE:
        return stored if dropout is None else {**stored, "dropout": dropout}
    if model_type != "gpt2":
        raise ValueError(f"{path} has model_type {model_type!r}, not 'gpt2' or {OWN_MODEL_TYPE!r}")

    gpt2 = {**GPT2_DEFAULTS, **stored}
    for key, allowed in GPT2_REQUIRED.items():
        if gpt2[key] not in allowed:
            options = " or ".join(map(repr, allowed))
            raise ValueError(f"{path} has {key} {gpt2[key]!r}; GPT needs {options}")
    fields = {name: gpt2[key] for name, key in GPT2_NAMES.items()}
    fields["dropout"] = _single_dropout(gpt2, path) if dropout is None else dropout
    eos = gpt2["eos_token_id"]
    fields["eos_token_id"] = eos if isinstance(eos, int) and eos < fields["vocab_size"] else None
    return {**GPT2_ARCHITECTURE, **fields}


def write_config(folder: str | os.PathLike[str], fields: dict[str, Any]) -> None:
    """Writes config.json for GPTConfig's `fields`: transformers' own for a GPT-2."""
    is_gpt2 = all(fields[name] == value for name, value in GPT2_ARCHITECTURE.items())
    if not is_gpt2 or fields["n_kv_head"] not in (None, fields["n_head"]):
        write_json(Path(folder, CONFIG), {"model_type": OWN_MODEL_TYPE, **fields})
        return
    gpt2 = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **GPT2_DEFAULTS,
        **{key: fields[name] for name, key in GPT2_NAMES.items()},
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), fields["dropout"]),
        "bos_token_id": fields["eos_token_id"],  # GPT-2 has one token for both
        "eos_token_id": fields["eos_token_id"],
    }
    write_json(Path(folder, CONFIG), gpt2)


def _single_dropout(gpt2: dict[str, Any], path: Path) -> float:
    rates = {key: gpt2[key] for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    if len(set(rates.values())) > 1:
        raise ValueError(f"{path} has {rates}; GPT has one rate: choose it with dropout=")
    return gpt2["resid_pdrop"]


# --- weights --------------------------------------------------------------------------------------


def read_weights(folder: str | os.PathLike[str], parameters: dict[str, Tensor]) -> None:
    """Copies the checkpoint's weights into our `parameters`, named as in GPT.named_parameters().

    Raises ValueError for a weight that is missing, unknown or of another shape.
    """
    missing = set(parameters)
    for key, stored in _stored_tensors(Path(folder)):
        name = key.removeprefix(PREFIX)
        if MASK_BUFFER.fullmatch(name) or (name == "lm_head.weight" and name not in parameters):
            continue  # a tied head repeats wte
        if name not in parameters:
            raise ValueError(f"{folder}: the checkpoint's {key} has no place in this GPT")
        value = stored.t() if CONV1D_WEIGHT.fullmatch(name) else stored
        if value.shape != parameters[name].shape:
            raise ValueError(
                f"{folder}: {key} has shape {tuple(stored.shape)}, which for {name} makes "
                f"{tuple(value.shape)}, not {tuple(parameters[name].shape)}"
            )
        with torch.no_grad():
            parameters[name].copy_(value)
        missing.discard(name)
    if missing:
        raise ValueError(f"{folder}: the checkpoint has no {', '.join(sorted(missing))}")


def write_weights(
    folder: str | os.PathLike[str], parameters: dict[str, Tensor], max_shard_bytes: int
) -> None:
    """Writes `parameters` to one file, or to several of at most max_shard_bytes and an index.

    Every file is replaced as a whole; an earlier checkpoint's other files are then removed.
    """
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for name, parameter in parameters.items():
        if parameter.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        room -= parameter.nbytes
        shards[-1][name if name == "lm_head.weight" else PREFIX + name] = parameter

    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file_name, shard in zip(names, shards, strict=True):
        tensors = {key: _stored_form(key, p).contiguous() for key, p in shard.items()}
        with replacing(Path(folder, file_name)) as file:
            write_tensors(Path(file.name), tensors, {"format": "pt"})
    if len(shards) > 1:
        weight_map = {key: names[i] for i, shard in enumerate(shards) for key in shard}
        total_size = sum(parameter.nbytes for parameter in parameters.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(Path(folder, INDEX), index)
        names.append(INDEX)
    for path in Path(folder).glob("model*.safetensors*"):
        if path.name not in names:
            path.unlink()


def _stored_form(key: str, parameter: Tensor) -> Tensor:
    value = parameter.detach().cpu()
    return value.t() if CONV1D_WEIGHT.fullmatch(key.removeprefix(PREFIX)) else value


def _stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The names and tensors of all the folder's weight files, one tensor in memory at a time."""
    safetensors = safetensors_package()
    for path in _weight_files(folder):
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    yield key, file.get_tensor(key)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        hint = ""
        if (folder / "pytorch_model.bin").is_file():
            hint = (
                "; pytorch_model.bin is a pickle, which could run code: convert it to safetensors"
            )
        raise FileNotFoundError(f"neither {WEIGHTS} nor {INDEX} in {folder}{hint}")
    names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / INDEX} names {name!r}, which is not in its folder")
    return [folder / name for name in names]
