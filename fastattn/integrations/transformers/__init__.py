"""Hugging Face transformers, 4.57 and 5, on fastattn's kernels.

    from fastattn.integrations.transformers import patch_loss, register

    register()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="fastattn")
    patch_loss(model)  # training: the loss without the logits

docs/transformers.md says what differs and what is refused.
"""

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from .attention import attention_forward
from .loss import patch_loss, unpatch_loss
from .masks import attention_mask

__all__ = ["attention_forward", "attention_mask", "patch_loss", "register", "unpatch_loss"]


def register(name: str = "fastattn") -> None:
    """Makes `attn_implementation=name` mean fastattn's attention, in every model of the process.

    For `from_pretrained` and `from_config`, and for `model.set_attn_implementation(name)` on a
    model that exists. transformers doesn't store the choice in config.json.

    `register("sdpa")` takes the place of what models run on that were asked for nothing: this one
    line is all that changes then, and models that have no soft cap or sinks under sdpa still have
    none.
    """
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)
