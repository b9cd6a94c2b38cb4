"""Small random models of transformers, and what they compute."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from fastattn.integrations.transformers import register  # noqa: E402
from fastattn.testing import Results  # noqa: E402

register()

VOCABULARY = 61
PAD, EOS, DECODER_START = 0, 2, 0
WINDOW = 6

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": EOS}
_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # so that weights are far from uniform
}
_LLAMA = {**_TOKENS, **_SHAPE, "num_key_value_heads": 2, "attention_dropout": 0.0}
_HEADS_OF_8 = {**_LLAMA, "head_dim": 8}
_WINDOWED = {**_HEADS_OF_8, "sliding_window": WINDOW}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GPT2 = {
    **_TOKENS,
    **{"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
    **{"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}
_T5 = {
    **_TOKENS,
    **{"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0},
    **{"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16},
    **{"decoder_start_token_id": DECODER_START, "initializer_factor": 1.0},
}
_BERT = {**_TOKENS, **_SHAPE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

# name: (configuration, its values, model)
_MODELS = {
    "gpt2": ("GPT2Config", _GPT2, "GPT2LMHeadModel"),
    "llama": ("LlamaConfig", _LLAMA, "LlamaForCausalLM"),
    "llama-tied": ("LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}, "LlamaForCausalLM"),
    "phi": ("PhiConfig", _LLAMA, "PhiForCausalLM"),  # its head has a bias
    "mistral": ("MistralConfig", _WINDOWED, "MistralForCausalLM"),
    "qwen3": ("Qwen3Config", _HEADS_OF_8, "Qwen3ForCausalLM"),
    "qwen2_moe": (  # a window that its layers don't mention
        "Qwen2MoeConfig",
        {
            **_LLAMA, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0,
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        "Qwen2MoeForCausalLM",
    ),
    "gemma2": ("Gemma2Config", {**_WINDOWED, "query_pre_attn_scalar": 8}, "Gemma2ForCausalLM"),
    "gpt_oss": ("GptOssConfig", {**_WINDOWED, **_EXPERTS}, "GptOssForCausalLM"),
    "granite": ("GraniteConfig", {**_LLAMA, "logits_scaling": 2.0}, "GraniteForCausalLM"),
    "cohere": ("CohereConfig", {**_LLAMA, "logit_scale": 0.25}, "CohereForCausalLM"),
    "llama4": (  # chunks instead of windows
        "Llama4TextConfig",
        {
            **_HEADS_OF_8, **_EXPERTS, "attention_chunk_size": WINDOW, "num_local_experts": 2,
            "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "moe_layers": [],
        },
        "Llama4ForCausalLM",
    ),
    "bert": ("BertConfig", _BERT, "BertForSequenceClassification"),
    "modernbert": (  # windows to both sides
        "ModernBertConfig",
        {**_TOKENS, **_SHAPE, "local_attention": 2 * WINDOW, "global_attn_every_n_layers": 2},
        "ModernBertForMaskedLM",
    ),
    "t5": ("T5Config", _T5, "T5ForConditionalGeneration"),
}  # fmt: skip


def make(name: str, attention: str = "fastattn"):
    """The model of that name in evaluation mode: the same weights every time."""
    config, values, model = _MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**values))
    made.set_attn_implementation(attention)
    return made.eval()


def tokens(batch: int = 3, length: int = 17) -> Tensor:
    return torch.randint(EOS + 1, VOCABULARY, (batch, length))


def padding(side: str | None, batch: int = 3, length: int = 17) -> Tensor | None:
    """(B, S) attention mask; None for None."""
    if side is None:
        return None
    pads = torch.tensor([5, 9, 0])[:batch]
    mask = (torch.arange(length) >= pads[:, None]).long()
    return mask if side == "left" else mask.flip(1)


def results(model, compute: Callable[..., Tensor]) -> Results:
    """What `compute` makes of the model, and the gradients of a weighted sum of it."""
    model.zero_grad()
    out = compute(model)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    gradients = {
        f"d{name}": parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"out": out.detach(), **gradients}


@functools.cache
def is_5() -> bool:
    return int(transformers.__version__.split(".")[0]) >= 5
