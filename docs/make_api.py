"""Writes docs/api.md from signatures and docstrings: `make docs`.

tests/test_docs.py holds the page to being current.
"""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from types import ModuleType

import fastattn
import fastattn.gpt
from fastattn import bert_padding, flash_attn
from fastattn.integrations import transformers

PAGE = Path(__file__).with_name("api.md")
SECTIONS: tuple[tuple[str, ModuleType, tuple[str, ...]], ...] = (
    (
        "Attention",
        fastattn,
        ("attention", "attention_varlen", "attention_decode", "explain"),
    ),
    (
        "Losses",
        fastattn,
        ("cross_entropy", "linear_cross_entropy", "CrossEntropyLoss", "LinearCrossEntropyLoss"),
    ),
    (
        "In place of torch's",
        fastattn,
        (
            "scaled_dot_product_attention",
            "sdpa",
            "replace_sdpa",
            "MultiheadAttention",
            "replace_modules",
        ),
    ),
    ("Looking inside", fastattn, ("attention_weights", "attention_entropy", "plot_attention")),
    (
        "In place of flash_attn's",
        flash_attn,
        tuple(name for name in flash_attn.__all__ if name != "bert_padding"),
    ),
    (
        "In place of flash_attn.bert_padding's",
        bert_padding,
        ("unpad_input", "pad_input", "index_first_axis", "index_put_first_axis"),
    ),
    ("Under transformers' models", transformers, ("register", "patch_loss", "unpatch_loss")),
    ("The model", fastattn, ("CausalSelfAttention",)),
    ("The model, of fastattn.gpt", fastattn.gpt, ("GPTConfig", "GPT")),
)


def page() -> str:
    lines = [
        "# API",
        "",
        "Made by `make docs` from the docstrings. [design.md](design.md) has what all parts share.",
    ]
    for title, module, names in SECTIONS:
        lines += ["", f"## {title}"]
        for name in names:
            lines += ["", *entry(module, name)]
    return "\n".join(lines) + "\n"


def entry(module: ModuleType, name: str) -> list[str]:
    thing = getattr(module, name)
    text = inspect.getdoc(thing) or ""
    if inspect.isclass(thing) and "forward" in vars(thing) and thing.forward.__doc__:
        forward = inspect.getdoc(thing.forward) or ""
        text += f"\n\nforward{signature(thing.forward)}\n\n{textwrap.indent(forward, '    ')}"
    return [
        f"### {name}",
        "",
        "```python",
        f"{module.__name__}.{name}{signature(thing)}",
        "```",
        "```text",
        *text.splitlines(),
        "```",
    ]


def signature(thing: object) -> str:
    """Names and defaults, a line of at most 100 characters or several."""
    parameters = inspect.signature(thing).parameters.values()  # type: ignore[arg-type]
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters if p.name != "self"]
    line = str(inspect.Signature(bare))
    if len(line) <= 80:
        return line
    wrapped = textwrap.wrap(line[1:-1], 92, break_long_words=False, break_on_hyphens=False)
    return "(\n" + "\n".join(f"    {part}" for part in wrapped) + "\n)"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
