"""A small Llama of transformers, batches for it, and the loss that it should have once it is patched, in plain torch.

For the tests whose names begin with test_transformers. The package is real, the models tiny and random. Where
transformers is not installed, each test module that imports this one is skipped, visibly.
"""

import pytest
import torch
import torch.nn.functional as F

from bench import transformers_sweep as sweep

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

VOCAB_SIZE = 128


def llama(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**{"vocab_size": VOCAB_SIZE, "num_key_value_heads": 2, **sizes, **options})
    return spread(transformers.LlamaForCausalLM(config))


def spread(model):
    """Make weights larger than training begins with, so that what is lost shows in the loss."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval()


def tokens(batch=2, length=32):
    return torch.randint(2, 100, (batch, length))


def masked(ids):
    labels = ids.clone()
    labels[0, 5:9] = labels[-1, 20:] = -100
    return labels


def expected_loss(model, ids, labels, patch, **inputs):
    """Return the loss in plain torch: mean embeddings in, the model's own logits out, targets one by one."""
    embeddings = model.get_input_embeddings()(ids).unflatten(1, (-1, patch)).mean(2)
    logits = model(inputs_embeds=embeddings, use_cache=False, **inputs).logits[:, :-1]
    targets = labels.unflatten(1, (-1, patch))[:, 1:]
    repeated = logits.unsqueeze(2).expand(-1, -1, patch, -1)
    return F.cross_entropy(repeated.flatten(0, 2), targets.flatten())


def assert_same(model, ours, expected):
    """Compare two losses and their gradients, the latter in the norm of all: some are zero but for rounding."""
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    ours, expected = sweep.gradients(model, ours), sweep.gradients(model, expected)
    assert expected.norm() > 0
    assert (ours - expected).norm() < 1e-5 * expected.norm()


def flat_batch():
    ids = tokens(1, 32)
    return {"input_ids": ids, "labels": ids.clone()}
