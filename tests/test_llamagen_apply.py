"""Patching LlamaGen's model and undoing it: what it leaves alone, which models and arguments it refuses."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from examples.llamagen_model import PlainTransformer, Transformer
from npp_kernels.integrations.llamagen import apply, coarse_rotary_table
from tests.llamagen_models import SIDE, SIZE, VOCAB_SIZE, batch_of, model_of


@torch.no_grad()
def generate(model, labels, *, cache):
    """Sample greedily, as LlamaGen's `generate` calls the model."""
    model.eval().setup_caches(len(labels), SIDE**2 + 1)
    position = torch.arange(1)
    token = model(None, labels, position)[0][:, -1].argmax(-1, keepdim=True)
    tokens = [token]
    for step in range(1, 10):
        token = model(token, None, torch.tensor([step]))[0][:, -1].argmax(-1, keepdim=True)
        tokens.append(token)
    for layer in model.layers:
        layer.attention.kv_cache = None
    return torch.cat(tokens, 1)


def test_sampling_and_checkpoints_do_not_change():
    labels = torch.tensor([1, 2])
    model = model_of()
    expected, keys = generate(model, labels, cache=True), list(model.state_dict())
    with apply(model):
        assert torch.equal(generate(model, labels, cache=True), expected)
        assert list(model.state_dict()) == keys
        model_of().load_state_dict(model.state_dict())
        logits, loss = model.train()(batch_of()[0], batch_of()[1])  # without targets: the model's own
        assert loss is None
        assert logits.shape == (3, SIDE**2, VOCAB_SIZE)
        model.eval().setup_caches(3, SIDE**2 + 1)
        with pytest.raises(ValueError, match="model: expected no cache beside targets"):
            model(*batch_of(), targets=batch_of()[0])


def test_undo_and_copies():
    tokens, labels = batch_of()
    model = model_of()
    patched = apply(model)
    with pytest.raises(ValueError, match="model: expected one that this was not applied to"):
        apply(model)
    average = copy.deepcopy(model)  # as an EMA is made
    nn.init.zeros_(average.output.weight)
    assert average(tokens, labels, targets=tokens, p=2)[1].item() == pytest.approx(torch.tensor(50.0).log().item())
    assert model(tokens, labels, targets=tokens, p=2)[1].item() != pytest.approx(torch.tensor(50.0).log().item())
    restored = pickle.loads(pickle.dumps(model))
    assert restored(tokens, labels, targets=tokens, p=2)[1] == model(tokens, labels, targets=tokens, p=2)[1]
    patched.undo()
    assert "forward" not in vars(model)
    assert model(tokens, labels, targets=tokens)[0] is not None


def test_undo_restores_a_forward_that_was_put_there():
    model = model_of()
    calls = []
    own = model.forward

    def counting(*arguments, **options):
        calls.append(1)
        return own(*arguments, **options)

    # A forward that takes anything is asked for the model's own loss without p, so it is given one that has it.
    counting.__signature__ = inspect.signature(own)
    model.forward = counting
    apply(model).undo()
    assert model.forward is counting
    assert len(calls) == 1  # the comparison


class ScaledLogits(Transformer):
    def finish(self, *arguments):
        self.norm.weight.data.mul_(2)
        try:
            return super().finish(*arguments)
        finally:
            self.norm.weight.data.div_(2)


def test_a_model_that_computes_something_else_is_refused():
    model = model_of(ScaledLogits)
    before = model.output.weight.clone()
    with pytest.raises(ValueError, match=r"model: expected the loss of LlamaGen's forward at patch 1, .* from its own"):
        apply(model)
    assert torch.equal(model.output.weight, before)
    assert "forward" not in vars(model)
    apply(model, check=False)


def test_the_comparison_leaves_no_trace():
    model = model_of(dropout=0.5)
    before, table = copy.deepcopy(model.state_dict()), model.freqs_cis
    torch.manual_seed(3)
    random = torch.get_rng_state()
    apply(model.eval())
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.training
    assert model.freqs_cis is table
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_that_gets_its_weights_later():
    tokens, labels = batch_of()
    with torch.device("meta"):
        model = Transformer(**SIZE)
    model.freqs_cis = model_of().freqs_cis
    with pytest.raises(ValueError, match="model: expected weights to compare with, got a model on meta"):
        apply(model)
    apply(model, check=False)
    model.to_empty(device="cpu").load_state_dict(model_of().state_dict())
    with apply(model_of()) as patched:
        assert model(tokens, labels, targets=tokens, p=2)[1] == patched.model(tokens, labels, targets=tokens, p=2)[1]


def test_errors_name_the_argument():
    tokens, labels = batch_of()
    model = model_of()
    with pytest.raises(TypeError, match="model: expected LlamaGen's Transformer, got Linear without block_size"):
        apply(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model: expected the model itself, got .*: apply to model._orig_mod"):
        apply(torch.compile(model))
    fine = coarse_rotary_table(model, 1)
    with apply(model):
        with pytest.raises(ValueError, match=r"freqs_cis: expected the 17 rows .* at patch 2, got 65"):
            model(tokens, labels, targets=tokens, p=2, freqs_cis=fine)
        with pytest.raises(ValueError, match="p: expected a patch that divides the grid of 8 by 8 tokens, got 3"):
            model(tokens, labels, targets=tokens, p=3)
        with pytest.raises(ValueError, match="patch_size: expected p² = 4, got 2"):
            model(tokens, labels, targets=tokens, p=2, patch_size=2)
        with pytest.raises(ValueError, match="idx: expected 64 tokens of an image, or all but the last, got 60"):
            model(tokens[:, :60], labels, targets=tokens, p=2)
    model.freqs_cis = coarse_rotary_table(model, 2)
    with pytest.raises(ValueError, match=r"model.freqs_cis: expected the 65 rows .* at patch 1, got 17"):
        coarse_rotary_table(model, 2)
    with apply(model_of(PlainTransformer)) as patched, pytest.raises(ValueError, match="p: expected 1 without targets"):
        patched.model(tokens, labels, p=2)
