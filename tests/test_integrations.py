"""The integrations, on stand-ins with the attributes of each trainer that they use."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from npp_kernels.integrations import transformers
from reference import ops

VOCAB_SIZE, HIDDEN_SIZE = 60, 16


class RunningMean(nn.Module):
    """A causal body: each position is the mean of itself and all before it, transformed."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)

    def forward(self, x):
        counts = torch.arange(1, x.shape[1] + 1).view(-1, 1)
        return torch.tanh(self.linear(x.cumsum(1) / counts))


class CausalLM(nn.Module):
    """What `transformers.patch_loss` uses of a Hugging Face model, with the loss that such a model computes."""

    def __init__(self, *, bias=False, **config):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE)
        self.body = RunningMean()
        self.head = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE, bias=bias)
        self.config = SimpleNamespace(**config)

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def base_model(self, *, inputs_embeds, use_cache):
        assert not use_cache
        return SimpleNamespace(last_hidden_state=self.body(inputs_embeds))

    def forward(self, input_ids, labels):
        logits = self.head(self.body(self.embedding(input_ids)))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def expanded_loss(logits, groups):
    """Return the mean cross entropy of logits that are repeated for each target, as the official code has it."""
    repeated = logits.unsqueeze(2).expand(-1, -1, groups.shape[2], -1)
    return F.cross_entropy(repeated.flatten(0, 2), groups.flatten())


def test_transformers_patch_of_one_is_the_models_own_loss():
    model = CausalLM(bias=True)
    ids = torch.randint(VOCAB_SIZE, (3, 12))
    labels = ids.clone()
    labels[1, 7:] = -100
    ours, own = transformers.patch_loss(model, ids, 1, labels=labels), model(ids, labels)
    torch.testing.assert_close(ours, own)
    parameters = list(model.parameters())
    for ours_grad, own_grad in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(own, parameters), strict=True
    ):
        torch.testing.assert_close(ours_grad, own_grad)


@pytest.mark.parametrize("normalize", ["target", "slot"])
def test_transformers_patch_predicts_the_next_patch(normalize):
    model = CausalLM(final_logit_softcapping=5.0)
    ids = torch.randint(VOCAB_SIZE, (3, 12))
    groups = ids.view(3, 4, 3)
    hidden = model.body(model.embedding(groups[:, :-1]).mean(2))
    expected, _ = ops.patch_cross_entropy(model.head(hidden), groups[:, 1:], normalize=normalize, softcap=5.0)
    torch.testing.assert_close(transformers.patch_loss(model, ids, 3, normalize=normalize), expected)


def test_transformers_refuses_what_it_would_get_wrong():
    ids = torch.randint(VOCAB_SIZE, (1, 8))
    with pytest.raises(ValueError, match=r"config.logit_scale=0.5"):
        transformers.patch_loss(CausalLM(logit_scale=0.5), ids, 2)
    scaled = CausalLM()
    scaled.embedding = type("ScaledEmbedding", (nn.Embedding,), {})(VOCAB_SIZE, HIDDEN_SIZE)
    with pytest.raises(TypeError, match=r"expected input embeddings of type torch.nn.Embedding, got ScaledEmbedding"):
        transformers.patch_loss(scaled, ids, 2)


