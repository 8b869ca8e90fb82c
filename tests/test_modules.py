"""The `torch.nn` modules: what they keep, move and save, and that they compute what the functions compute."""

import inspect

import pytest
import torch

import npp_kernels
from npp_kernels.losses import targets
from npp_kernels.losses.options import LossOptions


def test_embedding_is_an_embedding(device):
    plain = torch.nn.Embedding(20, 8, padding_idx=3, device=device)
    ours = npp_kernels.PatchEmbedding(20, 8, padding_idx=3, device=device)
    ours.load_state_dict(plain.state_dict())
    ids = torch.randint(20, (5, 1), device=device)
    ids[0] = 3
    assert torch.equal(ours(ids), plain(ids[:, 0]).masked_fill(ids == 3, 0))
    ours(ids).sum().backward()
    assert ours.weight.grad[3].abs().sum() == 0
    assert npp_kernels.PatchEmbedding.from_pretrained(plain.weight.detach())(ids).shape == (5, 8)
    order = npp_kernels.order_groups(ids, 20, ignore_index=3)
    (expected,) = torch.autograd.grad(ours(ids).square().sum(), ours.weight)
    assert torch.equal(torch.autograd.grad(ours(ids, order).square().sum(), ours.weight)[0], expected)
    with pytest.raises(ValueError, match="max_norm: expected max_norm to be off"):
        npp_kernels.PatchEmbedding(20, 8, max_norm=1.0)


def test_losses_equal_the_functions(device):
    logits = torch.randn(2, 6, 20, device=device)
    hidden, weight = torch.randn(2, 6, 8, device=device), torch.randn(20, 8, device=device)
    groups = torch.randint(20, (2, 6, 4), device=device)
    slot_weights = [1.0, 0.5, 0.25, 0.125]
    options = {"normalize": "slot", "label_smoothing": 0.1, "z_loss": 0.01}
    criterion = npp_kernels.PatchCrossEntropyLoss(slot_weights, **options).to(device)
    expected = npp_kernels.patch_cross_entropy(logits, groups, slot_weights=slot_weights, **options)
    assert torch.equal(criterion(logits, groups), expected)
    assert criterion.state_dict() == {}
    linear = npp_kernels.LinearPatchCrossEntropyLoss(slot_weights, chunk_rows=5, **options).to(device)
    expected = npp_kernels.linear_patch_cross_entropy(
        hidden, weight, groups, slot_weights=slot_weights, chunk_rows=5, **options
    )
    assert torch.equal(linear(hidden, weight, groups), expected)
    assert "label_smoothing=0.1" in repr(linear)
    counted = npp_kernels.PatchCrossEntropyLoss()(logits, groups, num_targets=7)
    assert torch.equal(counted, npp_kernels.patch_cross_entropy(logits, groups, num_targets=7))


def test_slot_weights_are_numbers_that_no_cast_or_move_changes(device):
    weights = [1.0, 1 / 3, 0.1, 0.7]
    logits, groups = torch.randn(6, 20, device=device), torch.randint(20, (6, 4), device=device)
    expected = npp_kernels.patch_cross_entropy(logits, groups, slot_weights=weights)
    with torch.device("meta"):
        criterion = npp_kernels.PatchCrossEntropyLoss(weights)
    assert torch.equal(criterion.to_empty(device=device)(logits, groups), expected)
    assert torch.equal(npp_kernels.PatchCrossEntropyLoss(torch.tensor(weights)).bfloat16()(logits, groups), expected)


def test_class_weights_move_with_the_module_and_are_saved(device):
    weight = torch.rand(20)
    criterion = npp_kernels.PatchCrossEntropyLoss(class_weight=weight).to(device)
    assert list(criterion.state_dict()) == ["class_weight"]
    logits, groups = torch.randn(6, 20, device=device), torch.randint(20, (6, 4), device=device)
    expected = npp_kernels.patch_cross_entropy(logits, groups, class_weight=weight.to(device))
    assert torch.equal(criterion(logits, groups), expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduction": "avg"}, "reduction: expected one of"),
        ({"label_smoothing": 2.0}, "label_smoothing: expected a number"),
        ({"slot_weights": [1.0, -1.0]}, "slot_weights: expected finite weights of at least 0"),
        ({"slot_weights": [1.0], "reduction": "none"}, "slot_weights: expected None"),
    ],
)
def test_bad_options_fail_where_the_module_is_made(options, words):
    for module in (npp_kernels.PatchCrossEntropyLoss, npp_kernels.LinearPatchCrossEntropyLoss):
        with pytest.raises(ValueError, match=words):
            module(**options)
    with pytest.raises(ValueError, match="chunk_rows: expected an int of at least 1"):
        npp_kernels.LinearPatchCrossEntropyLoss(chunk_rows=0)


def test_slot_weights_of_python_are_copied_to_a_device_once(device, monkeypatch):
    """A second copy would make the host wait, and end a capture; what a CUDA graph may read is never let go."""
    monkeypatch.setattr(targets, "_kept_weights", {})
    logits, groups = torch.randn(3, 9, device=device), torch.randint(9, (3, 2), device=device)
    expected = npp_kernels.patch_cross_entropy(logits, groups, slot_weights=torch.tensor([0.25, 0.75], device=device))
    like = logits.new_empty(0)
    found = []
    for _ in range(2):
        options = LossOptions(slot_weights=[0.25, 0.75])
        found.append(targets.find_targets(groups, options, like)[0].slot_scale)
        for index in range(targets.MAX_KEPT_WEIGHTS + 1):
            targets.find_targets(groups, LossOptions(slot_weights=[float(index), 1.0]), like)
    assert found[0] is found[1]
    assert torch.equal(npp_kernels.patch_cross_entropy(logits, groups, slot_weights=(0.25, 0.75)), expected)


@pytest.mark.parametrize(
    ("function", "by_position"),
    [
        (npp_kernels.PatchCrossEntropyLoss, ["slot_weights"]),
        (npp_kernels.PatchCrossEntropyLoss.forward, ["self", "logits", "groups"]),
        (npp_kernels.LinearPatchCrossEntropyLoss, ["slot_weights"]),
        (npp_kernels.LinearPatchCrossEntropyLoss.forward, ["self", "hidden", "weight", "groups"]),
        (npp_kernels.patch_cross_entropy, ["logits", "groups"]),
        (npp_kernels.linear_patch_cross_entropy, ["hidden", "weight", "groups"]),
        (npp_kernels.group_mean, ["table", "groups"]),
        (npp_kernels.order_groups, ["groups", "vocab_size"]),
    ],
)
def test_options_are_given_by_name(function, by_position):
    parameters = inspect.signature(function).parameters.values()
    assert [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD] == (
        by_position
    )
    assert not any(parameter.kind is parameter.POSITIONAL_ONLY for parameter in parameters)


def test_options_have_the_defaults_of_the_function():
    function = inspect.signature(npp_kernels.patch_cross_entropy).parameters
    module = inspect.signature(npp_kernels.PatchCrossEntropyLoss).parameters
    assert {name: module[name].default for name in module} == {name: function[name].default for name in module}
