"""patch_loss: the models' own losses and gradients, without the logits."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from test_transformers_attention import assert_same
from transformers_models import VOCABULARY, is_5, make, tokens, transformers

from fastattn.integrations.transformers import patch_loss, unpatch_loss

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = ["gpt2", "llama", "llama-tied", "phi", "mistral", "gemma2", "gpt_oss", "granite", "cohere"]


def batch():
    ids = tokens()
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


def trained(model, **inputs):
    """The output in training mode, and the loss and gradients."""
    model.train().zero_grad()
    output = model(**inputs, use_cache=False)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return output, {"loss": output.loss.detach(), **gradients}


@pytest.mark.parametrize(
    "extra", [{}, {"num_items_in_batch": torch.tensor(77)}, {"ignore_index": 5}]
)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(name, extra):
    model, inputs = make(name), {**batch(), **extra}
    inputs["labels"] = inputs["labels"].where(
        inputs["labels"] >= 0, extra.get("ignore_index", -100)
    )
    before, keys = model.config.to_dict(), model.state_dict().keys()
    plain, want = trained(model, **inputs)
    patch_loss(model)
    output, got = trained(model, **inputs)
    assert_same(got, want)
    assert output.logits is None and plain.logits is not None and type(output) is type(plain)
    assert model.config.to_dict() == before and model.state_dict().keys() == keys
    unpatch_loss(model)
    output, again = trained(model, **inputs)
    assert output.logits is not None
    assert_same(again, want)


def test_logits_when_they_are_wanted():
    model, inputs = make("gemma2"), batch()
    plain = model(**inputs)
    patch_loss(model)
    output = model(**inputs)
    assert torch.equal(output.logits, plain.logits)
    torch.testing.assert_close(output.loss, plain.loss)
    assert torch.equal(model(inputs["input_ids"]).logits, plain.logits)
    assert len(model(**inputs, return_dict=False, use_cache=False)) == 2
    patch_loss(model, logits=False)
    output = model(**inputs)
    assert output.logits is None
    torch.testing.assert_close(output.loss, plain.loss)
    assert len(model(**inputs, return_dict=False, use_cache=False)) == 1
    patch_loss(model, logits=True)
    assert torch.equal(model.train()(**inputs).logits, plain.logits)


@pytest.mark.parametrize("logits", [False, True])
def test_label_smoothing_is_trainers(logits):
    from transformers.trainer_pt_utils import LabelSmoother

    model, inputs = make("llama"), batch()
    labels = inputs["labels"]
    want = LabelSmoother(0.1)(model(inputs["input_ids"]), labels, shift_labels=True)
    patch_loss(model, label_smoothing=0.1, logits=logits)
    torch.testing.assert_close(model(**inputs).loss, want)


def test_z_loss_and_positional_labels():
    model, inputs = make("gpt2"), batch()
    logits = model(inputs["input_ids"]).logits[:, :-1]
    valid = inputs["labels"][:, 1:] != -100
    z = logits.logsumexp(-1).square()[valid].mean()
    want = model(**inputs).loss + 0.01 * z
    patch_loss(model, z_loss=0.01, logits=False)
    torch.testing.assert_close(model(**inputs).loss, want)
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    by_position = [inputs.get(name) for name in names[: names.index("labels") + 1]]
    torch.testing.assert_close(model(*by_position).loss, want)


@pytest.mark.parametrize("name", ["gpt_oss", "qwen2_moe"])
def test_experts_keep_their_own_loss(name):
    model, inputs = make(name), {**batch(), "output_router_logits": True}
    plain, want = trained(model, **inputs)
    patch_loss(model)
    output, got = trained(model, **inputs)
    assert_same(got, want)
    assert output.logits is None and float(output.aux_loss) == float(plain.aux_loss) != 0


def test_copies_are_patched_on_their_own():
    model, inputs = make("llama"), batch()
    patch_loss(model, logits=False)
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(twin.lm_head.weight)
    assert float(twin(**inputs).loss) == pytest.approx(torch.tensor(VOCABULARY).log().item())
    unpatch_loss(twin)
    assert twin(**inputs).logits is not None and model(**inputs).logits is None


def test_saving_forgets_it(tmp_path):
    model = make("llama")
    patch_loss(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert type(loaded) is transformers.LlamaForCausalLM


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "granite", "cohere"])
def test_compiled(name):
    """From the first pass on: what scaling there is need not have been seen before."""
    model, inputs = make(name), batch()
    _, want = trained(model, **inputs)
    patch_loss(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(**inputs, use_cache=False)
    model.zero_grad()
    output.loss.backward()
    assert output.logits is None
    got = {"loss": output.loss.detach(), **{n: p.grad for n, p in model.named_parameters()}}
    assert_same(got, want)


def test_generation_is_untouched():
    ids = tokens()
    want = make("llama").generate(ids, max_new_tokens=8, do_sample=False)
    model = make("llama")
    patch_loss(model, logits=False)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), want)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, reason",
    [
        ("t5", "its forward computes the loss itself"),
        ("bert", "its head is nothing"),
        pytest.param(
            *("modernbert", "its loss function is not"),
            marks=pytest.mark.skipif(not is_5(), reason="not in 4.57's table of losses"),
        ),
    ],
)
def test_models_it_can_not_take(name, reason):
    model = make(name)
    with pytest.raises(ValueError, match=f"{type(model).__name__}: {reason}"):
        patch_loss(model)


class Shifted(transformers.LlamaForCausalLM):
    """Does what isn't scaling to its logits."""

    def forward(self, input_ids, labels=None, return_dict=True, **_):
        logits = self.lm_head(self.model(input_ids).last_hidden_state) / 2 + 1
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=VOCABULARY)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


def test_what_is_done_to_logits_is_noticed():
    model, inputs = make("llama"), batch()
    model.__class__, model.config.logits_scaling = Shifted, 2.0
    want = model(**inputs).loss
    patch_loss(model)
    with pytest.raises(RuntimeError, match=r"Shifted.*something to its logits"):
        model.train()(**inputs)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"Shifted.*something to its logits"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
    patch_loss(model, logits=True)
    torch.testing.assert_close(model(**inputs).loss, want)


def test_a_scaled_head_with_a_bias():
    """No model of transformers has both. The bias is scaled too."""

    class Scaled(transformers.PhiForCausalLM):
        def forward(self, input_ids, labels=None, return_dict=True, **_):
            logits = self.lm_head(self.model(input_ids).last_hidden_state) / 2
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=VOCABULARY)
            return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)

    model, inputs = make("phi"), batch()
    model.__class__, model.config.logits_scaling = Scaled, 2.0
    torch.nn.init.normal_(model.lm_head.bias)
    _, want = trained(model, **inputs)
    patch_loss(model)
    output, got = trained(model, **inputs)
    assert output.logits is None
    assert_same(got, want)


def test_a_loss_that_is_set_afterwards_is_what_runs():
    """With the logits that it takes, in the user's hands from then on."""
    model, inputs = make("llama").train(), batch()
    patch_loss(model)
    model.loss_function = lambda logits, labels, **_: logits.square().mean()
    output = model(**inputs)
    torch.testing.assert_close(output.loss, output.logits.square().mean())
    unpatch_loss(model)
    assert type(model) is transformers.LlamaForCausalLM
    torch.testing.assert_close(model(**inputs).loss, output.loss)


def test_heads_and_hooks():
    with pytest.raises(TypeError, match="got Linear"):
        patch_loss(torch.nn.Linear(2, 2))
    model = make("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="its head is a Sequential"):
        patch_loss(model)
    model = make("llama")
    model.forward = model.forward
    with pytest.raises(ValueError, match="hooks"):
        patch_loss(model)
    model = make("llama")
    model.loss_function = lambda **_: 0
    with pytest.raises(ValueError, match="its loss function is not"):
        patch_loss(model)
    unpatch_loss(model)
    assert model.loss_function() == 0


# --- Trainer --------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """Sequences that repeat themselves, the first tokens of each without labels."""

    def __init__(self, rows: int):
        self.ids = tokens(rows, 4).repeat(1, 4)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        labels = self.ids[i].clone()
        labels[: i % 5] = -100
        return {"input_ids": self.ids[i], "labels": labels}


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_trainer_fine_tunes_as_before(label_smoothing, tmp_path):
    """Over accumulated gradients, whose losses it counts by tokens, and with metrics of logits."""
    pytest.importorskip("accelerate")

    def right(prediction) -> dict[str, float]:
        assert prediction.predictions.shape == (8, 16, VOCABULARY)
        return {"right": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}

    def fine_tuned(attention: str, patched: bool) -> list[float]:
        model = make("gpt2", attention)
        if patched:
            patch_loss(model)
        torch.manual_seed(1)
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                output_dir=str(tmp_path),
                max_steps=6,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                learning_rate=1e-2,
                label_smoothing_factor=label_smoothing,
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Rows(40),
            eval_dataset=Rows(8),
            compute_metrics=right,
        )
        trainer.train()
        metrics = trainer.evaluate()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return [*losses, metrics["eval_loss"], metrics["eval_right"]]

    want = fine_tuned("eager", patched=False)
    assert want[5] < 0.9 * want[0]
    assert fine_tuned("fastattn", patched=True) == pytest.approx(want, rel=1e-3)
