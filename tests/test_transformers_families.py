"""Families of language models in transformers: whose loss is the model's own once it is patched, and who is refused."""

import pytest
import torch

from bench import transformers_sweep as sweep
from npp_kernels.integrations.transformers import UnsupportedModelError, apply
from tests.transformers_models import VOCAB_SIZE, assert_same, masked, spread, tokens

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

# Each has something that a loss of one's own loses: scaled embeddings, scaled or capped logits, experts' auxiliary
# loss, multipliers, latent attention, positions that are learnt, no attention, a head with a transform, and so on.
FAMILIES = [
    "llama", "gemma", "gemma2", "gemma3_text", "cohere", "granite", "mixtral", "jetmoe", "falcon_h1", "deepseek_v3",
    "llama4_text", "gpt2", "opt", "mamba", "recurrent_gemma", "xlstm", "bert", "nanochat",
]  # fmt: skip
SOFT_CAPS = {"gemma2", "recurrent_gemma", "xlstm", "nanochat"}


@pytest.mark.parametrize("kind", FAMILIES)
def test_loss_and_gradients_of_a_family(kind):
    model = sweep.small_model(kind)
    ids = tokens()
    labels = masked(ids)
    own = model(input_ids=ids, labels=labels, use_cache=False).loss
    with apply(model) as patched:
        assert patched.formulation.fused
        assert (patched.formulation.softcap is not None) == (kind in SOFT_CAPS)
        outputs = model(input_ids=ids, labels=labels)
        assert outputs.logits is None
        assert_same(model, outputs.loss, own)
        patched.patch = sweep.PATCH
        assert_same(
            model, model(input_ids=ids, labels=labels).loss, sweep.expected_at_patch(model, patched, ids, labels)
        )
    torch.testing.assert_close(model(input_ids=ids, labels=labels, use_cache=False).loss, own)


@pytest.mark.parametrize("kind", ["mixtral", "jetmoe"])
def test_the_auxiliary_loss_of_experts_is_kept(kind):
    model = sweep.small_model(kind)
    ids = tokens()
    with apply(model, 4):
        outputs = model(input_ids=ids, labels=ids)
        without = model(input_ids=ids, labels=ids, output_router_logits=False)
    name = "router_aux_loss_coef" if kind == "mixtral" else "aux_loss_coef"
    weight = getattr(model.config, name)
    assert weight * outputs.aux_loss > 1e-4
    torch.testing.assert_close(outputs.loss, without.loss + weight * outputs.aux_loss)


def seq2seq():
    config = transformers.T5Config(vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


def bidirectional():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return spread(transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=VOCAB_SIZE, **sizes)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (seq2seq, "expected a decoder alone, got T5ForConditionalGeneration, which has an encoder"),
        (bidirectional, "see those before it alone, got logits that depend on later tokens"),
        # Their own loss does not shift: labels are expected to be shifted already.
        *[
            (lambda kind=kind: sweep.small_model(kind), "the model's own loss is .*, that of its next tokens")
            for kind in ("bart", "mbart", "mvp", "marian", "blenderbot")
        ],
        (lambda: sweep.small_model("gemma4_text"), "its forward refuses means of embeddings"),
        (lambda: sweep.small_model("gemma3n_text"), "leave model.embed_tokens_per_layer.weight without gradient"),
        (lambda: sweep.small_model("deepseek_v4"), "AttributeError"),  # routes by ids
        (lambda: sweep.small_model("cpmant"), "a forward that takes inputs_embeds, got that of CpmAntForCausalLM"),
    ],
)
def test_a_model_whose_loss_is_not_that_of_its_next_tokens_is_refused(make, message):
    model = make()
    before = set(vars(model))
    with pytest.raises(UnsupportedModelError, match=message):
        apply(model, 4)
    assert set(vars(model)) == before


def test_no_silent_difference_is_in_the_table():
    page = sweep.PAGE.read_text(encoding="utf-8")
    outcomes = [line.split(" | ")[2] for line in page.splitlines() if line.startswith("| ")][2:]
    assert len(outcomes) > 190
    assert set(outcomes) == {"fused", "own logits", "refused", "own forward fails", "not built"}
    assert outcomes.count("fused") > 130
