"""Which layers may be replaced by an operation on their weight, and which must not."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from npp_kernels.integrations._layers import embedding_difference, linear_difference, plain_embedding, plain_linear


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids):
        return 8 * super().forward(ids)


class Linear(nn.Linear):
    """An adapter, under the name of what it adapts."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 20, bias=False)

    def forward(self, hidden):
        return super().forward(hidden) + self.up(self.down(hidden))


class Named(nn.Linear):
    """A subclass that computes what its base does."""


def with_own_forward():
    linear = nn.Linear(8, 20)
    linear.forward = lambda hidden: hidden
    return linear


def with_hook(kind, module):
    getattr(module, f"register_{kind}")(lambda *arguments: None)
    return module


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (Linear(8, 20), r"got a test_layers\.Linear with a forward of its own|tests\.test_layers\.Linear with a forw"),
        (with_own_forward(), "got a torch.nn.modules.linear.Linear with a forward of its own"),
        (nn.Sequential(nn.Linear(8, 20)), "got a torch.nn.modules.container.Sequential"),
        (nn.Embedding(20, 8), "got a torch.nn.modules.sparse.Embedding"),
        (with_hook("forward_hook", nn.Linear(8, 20)), "Linear with forward_hooks"),
        (with_hook("forward_pre_hook", nn.Linear(8, 20)), "Linear with forward_pre_hooks"),
        (with_hook("full_backward_hook", nn.Linear(8, 20)), "Linear with backward_hooks"),
        (with_hook("full_backward_pre_hook", nn.Linear(8, 20)), "Linear with backward_pre_hooks"),
        (prune.l1_unstructured(nn.Linear(8, 20), "weight", 0.5), "Linear with forward_pre_hooks"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_an_output_layer_that_does_more(layer, words):
    with pytest.raises(TypeError, match=f"^output: expected a plain torch.nn.Linear.*({words})"):
        plain_linear(layer)


def gather(module, inputs):
    """Stands for what FSDP does around a layer."""


def test_what_only_shards_is_no_difference():
    def only_shards(function):
        return function is gather

    linear = nn.Linear(8, 20)
    linear.register_forward_pre_hook(gather)
    assert linear_difference(linear) == "a torch.nn.modules.linear.Linear with forward_pre_hooks"
    assert linear_difference(linear, only_shards=only_shards) is None
    other = linear.register_forward_pre_hook(lambda module, inputs: None)
    assert linear_difference(linear, only_shards=only_shards).endswith("with forward_pre_hooks")
    other.remove()
    linear.forward = gather
    assert linear_difference(linear, only_shards=only_shards) is None
    linear.forward = lambda hidden: hidden
    assert linear_difference(linear, only_shards=only_shards).endswith("with a forward of its own")
    assert linear_difference(Linear(8, 20), only_shards=lambda function: True).endswith("with a forward of its own")


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (ScaledEmbedding(20, 8), "ScaledEmbedding with a forward of its own"),
        (nn.Embedding(20, 8, max_norm=1.0), "with max_norm=1.0"),
        (nn.Embedding(20, 8, padding_idx=0), "with padding_idx=0"),
        (nn.Embedding(20, 8, scale_grad_by_freq=True), "with scale_grad_by_freq=True"),
        (nn.Embedding(20, 8, sparse=True), "with sparse=True"),
        (nn.EmbeddingBag(20, 8), "EmbeddingBag"),
        (with_hook("forward_hook", nn.Embedding(20, 8)), "with forward_hooks"),
    ],
)
def test_an_embedding_that_does_more(layer, words):
    with pytest.raises(TypeError, match=f"^embedding: expected a plain torch.nn.Embedding, got an? .*{words}"):
        plain_embedding(layer)


def test_layers_that_do_no_more():
    embedding = nn.Embedding(20, 8)
    assert plain_embedding(embedding) is embedding.weight
    for linear in (nn.Linear(8, 20), nn.Linear(8, 20, bias=False), Named(8, 20)):
        weight, bias = plain_linear(linear)
        assert weight is linear.weight
        assert bias is linear.bias
    compiled = nn.Linear(8, 20)
    compiled.compile(backend="eager")  # in place: the same forward
    assert linear_difference(compiled) is None


def test_a_parametrised_weight_is_what_the_layer_itself_reads():
    linear = parametrizations.orthogonal(nn.Linear(8, 20))
    hidden = torch.randn(3, 8)
    with parametrize.cached():
        weight, bias = plain_linear(linear)
        torch.testing.assert_close(torch.nn.functional.linear(hidden, weight, bias), linear(hidden))
    weight.sum().backward()
    assert linear.parametrizations.weight.original.grad is not None


def test_both_are_traced():
    embedding, linear = nn.Embedding(20, 8), nn.Linear(8, 20)

    @torch.compile(backend="eager", fullgraph=True)
    def compute(ids):
        assert embedding_difference(embedding) is None
        weight, bias = plain_linear(linear)
        return torch.nn.functional.linear(plain_embedding(embedding)[ids], weight, bias)

    ids = torch.randint(20, (3, 5))
    torch.testing.assert_close(compute(ids), linear(embedding(ids)))
