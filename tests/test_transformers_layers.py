"""Models of transformers whose head or embedding does more than a table: hooks, biases, adapters, half precision."""

import pytest
import torch
from torch import nn

from npp_kernels.integrations.transformers import apply
from tests.transformers_models import VOCAB_SIZE, assert_same, expected_loss, flat_batch, llama, spread, tokens

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Doubled(nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


def test_a_head_that_is_more_than_linear_gives_its_own_logits():
    model = llama()
    head = Doubled(32, VOCAB_SIZE, bias=True)
    model.lm_head = head
    ids = tokens()
    expected = expected_loss(model, ids, ids, 4)
    patched = apply(model, 4)
    assert not patched.formulation.fused
    assert "Doubled with a forward of its own" in patched.formulation.reason
    outputs = model(input_ids=ids, labels=ids)
    assert outputs.logits.shape == (2, 8, VOCAB_SIZE)
    assert_same(model, outputs.loss, expected)


def test_a_head_with_a_bias_is_fused():
    model = llama()
    model.lm_head = nn.Linear(32, VOCAB_SIZE)
    ids = tokens()
    expected = expected_loss(model, ids, ids, 4)
    assert apply(model, 4).formulation.fused
    assert_same(model, model(input_ids=ids, labels=ids).loss, expected)


def test_arithmetic_that_nothing_names_is_left_to_the_model():
    class Squashed(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, inputs_embeds=None, labels=None, **options):
            outputs = super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **options)
            outputs.logits = outputs.logits.sinh()
            if labels is not None:
                outputs.loss = self.loss_function(outputs.logits, labels, vocab_size=VOCAB_SIZE)
            return outputs

    model = spread(Squashed(llama().config))
    ids = tokens()
    own, expected = model(input_ids=ids, labels=ids).loss, expected_loss(model, ids, ids, 4)
    patched = apply(model)
    assert patched.formulation.reason == "the logits are not hidden · Wᵀ + b, nor a known function of it"
    assert_same(model, model(input_ids=ids, labels=ids).loss, own)
    patched.patch = 4
    assert_same(model, model(input_ids=ids, labels=ids).loss, expected)


def test_a_hook_that_comes_later_ends_the_fusing():
    model = llama()
    apply(model, 4)
    ids = tokens()
    assert model(input_ids=ids, labels=ids).logits is None
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * 3)
    outputs = model(input_ids=ids, labels=ids)
    assert outputs.logits is not None
    assert_same(model, outputs.loss, expected_loss(model, ids, ids, 4))


def test_a_head_of_zeros_is_still_told_apart():
    model = llama()
    nn.init.zeros_(model.lm_head.weight)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits.tanh())
    assert not apply(model).formulation.fused
    assert not model.lm_head.weight.any()


@pytest.mark.parametrize("padding", [None, 0])
def test_what_an_embedding_does_besides_is_kept(padding):
    model = llama(pad_token_id=padding)
    ids = tokens()
    ids[:, 3:8] = 0
    handle = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output * 7)
    expected = expected_loss(model, ids, ids, 4)
    apply(model, 4)
    assert_same(model, model(input_ids=ids, labels=ids).loss, expected)
    handle.remove()
    loss = model(input_ids=ids, labels=ids).loss
    assert_same(model, loss, expected_loss(model, ids, ids, 4))
    loss = model(input_ids=ids, labels=ids).loss
    (gradient,) = torch.autograd.grad(loss, [model.get_input_embeddings().weight])
    assert gradient[0].any() == (padding is None)


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}, False),
    ],
)
def test_adapters(options, fused):
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, init_lora_weights=False, **options))
    ids = tokens()
    own = model(input_ids=ids, labels=ids).loss
    expected = expected_loss(model.get_base_model(), ids, ids, 4)
    patched = apply(model)
    assert patched.formulation.fused == fused
    assert_same(model, model(input_ids=ids, labels=ids).loss, own)
    patched.patch = 4
    loss = model(input_ids=ids, labels=ids).loss
    assert_same(model, loss, expected)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    untouched = [name for name, value in model.named_parameters() if value.requires_grad and not value.grad.any()]
    assert not untouched


def test_half_precision_models():
    model, batch = llama().to(torch.bfloat16), flat_batch()
    expected = expected_loss(model, batch["input_ids"], batch["labels"], 4)
    assert apply(model, 4).formulation.fused
    torch.testing.assert_close(model(**batch).loss.to(torch.bfloat16), expected, atol=0.05, rtol=0)
