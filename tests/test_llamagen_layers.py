"""LlamaGen's forward, patched, where the embedding or the output layer does more than look up or multiply."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from npp_kernels import group_tokens
from npp_kernels.integrations.llamagen import patch_inputs, patch_loss
from tests.llamagen_models import DIM, SIDE, VOCAB_SIZE, assert_equal, batch_of, both, coarse, model_of


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 8 * super().forward(ids)


class Adapted(nn.Linear):
    """A head with a low-rank adapter, as LoRA has it."""

    def __init__(self):
        super().__init__(DIM, VOCAB_SIZE, bias=False)
        self.down, self.up = nn.Linear(DIM, 2, bias=False), nn.Linear(2, VOCAB_SIZE, bias=False)

    def forward(self, hidden):
        return super().forward(hidden) + self.up(self.down(hidden))


def hooked(module, scale):
    module.register_forward_hook(lambda module, arguments, result: result * scale)
    return module


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("output", Adapted),
        ("output", lambda: hooked(nn.Linear(DIM, VOCAB_SIZE), 0.5)),
        ("output", lambda: nn.Linear(DIM, VOCAB_SIZE)),  # with a bias
        ("tok_embeddings", lambda: Scaled(VOCAB_SIZE, DIM)),
        ("tok_embeddings", lambda: hooked(nn.Embedding(VOCAB_SIZE, DIM), 3.0)),
        ("tok_embeddings", lambda: nn.Embedding(VOCAB_SIZE, DIM, max_norm=0.5)),
        ("tok_embeddings", lambda: nn.Embedding(VOCAB_SIZE, DIM, padding_idx=3)),
        ("tok_embeddings", lambda: nn.Embedding(VOCAB_SIZE, DIM, scale_grad_by_freq=True)),
    ],
)
@pytest.mark.parametrize("p", [1, 2])
def test_layers_that_do_more_are_called(name, layer, p):
    tokens, labels = batch_of()
    model = model_of()
    setattr(model, name, layer())
    results = both(model, idx=tokens, cond_idx=labels, targets=tokens, **coarse(model, p))
    assert_equal(results)
    if name == "output" and layer is Adapted:
        assert all(results[0][1][f"output.{part}.weight"].abs().max() > 0 for part in ("down", "up"))


def test_a_sparse_embedding_keeps_its_sparse_gradient():
    tokens, labels = batch_of()
    model = model_of()
    model.tok_embeddings = nn.Embedding(VOCAB_SIZE, DIM, sparse=True)
    (_, ours), (_, theirs) = both(model, idx=tokens, cond_idx=labels, targets=tokens, **coarse(model, 2))
    assert ours["tok_embeddings.weight"].is_sparse
    ours, theirs = (grads["tok_embeddings.weight"].to_dense() for grads in (ours, theirs))
    torch.testing.assert_close(ours, theirs)


def test_the_two_lines_refuse_or_do_right():
    groups = group_tokens(batch_of()[0], 2, grid=(SIDE, SIDE))
    with pytest.raises(
        TypeError, match=r"embedding: expected a plain torch.nn.Embedding, got a .*Scaled with a forward"
    ):
        patch_inputs(Scaled(VOCAB_SIZE, DIM), groups)
    head, hidden = Adapted(), torch.randn(3, 16, DIM)
    expanded = head(hidden).unsqueeze(2).expand(-1, -1, 4, -1).flatten(0, 2)
    torch.testing.assert_close(patch_loss(hidden, head, groups), F.cross_entropy(expanded, groups.flatten()))
