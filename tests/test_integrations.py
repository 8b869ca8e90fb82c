"""The integrations, on stand-ins with the attributes of each trainer that they use."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from npp_kernels import PatchSchedule, group_tokens
from npp_kernels.integrations import llamagen, torchtitan
from npp_kernels.integrations.lightning import PatchStages

VOCAB_SIZE, HIDDEN_SIZE = 60, 16


class RunningMean(nn.Module):
    """A causal body: each position is the mean of itself and all before it, transformed."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)

    def forward(self, x):
        counts = torch.arange(1, x.shape[1] + 1).view(-1, 1)
        return torch.tanh(self.linear(x.cumsum(1) / counts))


def expanded_loss(logits, groups):
    """Return the mean cross entropy of logits that are repeated for each target, as the official code has it."""
    repeated = logits.unsqueeze(2).expand(-1, -1, groups.shape[2], -1)
    return F.cross_entropy(repeated.flatten(0, 2), groups.flatten())


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_llamagen_is_the_official_formulation(patch):
    embedding, body = nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE), RunningMean()
    output = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE, bias=False)
    tokens, condition = torch.randint(VOCAB_SIZE, (2, 64)), torch.randn(2, 1, HIDDEN_SIZE)

    image = embedding(tokens).unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    expected_inputs = F.avg_pool2d(image, patch).flatten(2).transpose(1, 2)[:, :-1]
    groups = group_tokens(tokens, patch, grid=(8, 8))
    inputs = llamagen.patch_inputs(embedding, groups)
    torch.testing.assert_close(inputs, expected_inputs)

    hidden = body(torch.cat((condition, inputs), dim=1))
    targets = F.unfold(tokens.view(2, 1, 8, 8).float(), patch, stride=patch).transpose(1, 2).long()
    expected = expanded_loss(output(hidden), targets)
    torch.testing.assert_close(llamagen.patch_loss(hidden, output, groups), expected)
    torch.testing.assert_close(llamagen.patch_loss(hidden, output, groups, num_targets=256), expected / 2)


def test_torchtitan_patch_of_one_is_the_ordinary_loss():
    pred, labels = torch.randn(2, 12, VOCAB_SIZE), torch.randint(VOCAB_SIZE, (2, 12))
    labels[0, :5] = -100
    expected = F.cross_entropy(pred.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(torchtitan.patch_loss(pred, labels), expected)


def test_torchtitan_patch_predicts_the_next_patch():
    # As the data loader makes them: 13 tokens, of which the labels are one ahead of the inputs.
    tokens = torch.randint(VOCAB_SIZE, (2, 13))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    embedding = nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE)
    bag = torchtitan.PatchBag(embedding, 3)
    torch.testing.assert_close(bag(inputs), embedding(inputs).unflatten(1, (4, 3)).mean(2))
    assert dict(bag.named_parameters()) == {"weight": embedding.weight}

    pred = torch.randn(2, 4, VOCAB_SIZE)
    known = expanded_loss(pred[:, :-1], tokens[:, 3:12].view(2, 3, 3)) * 18
    last = F.cross_entropy(pred[:, -1], tokens[:, 12], reduction="sum")
    torch.testing.assert_close(torchtitan.patch_loss(pred, labels), (known + last) / 20)
    torch.testing.assert_close(torchtitan.patch_loss(pred, labels, reduction="sum"), known + last)
    with pytest.raises(ValueError, match="labels: expected a multiple of the 5 patches of pred, got 12"):
        torchtitan.patch_loss(torch.randn(2, 5, VOCAB_SIZE), labels)


def test_lightning_sets_the_stage_and_the_rate_of_every_step():
    schedule = PatchSchedule([(2, 10), (1, 30)])
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": 0.5}])
    trainer, module = SimpleNamespace(global_step=0, optimizers=[optimizer]), SimpleNamespace()

    def state_at(stages, step):
        trainer.global_step = step
        stages.on_train_batch_start(trainer, module, None, 0)
        return module.patch, trainer.optimizers[0].param_groups[0]["lr"]

    options = {"warmup_steps": 4, "decay_ratio": 0.5, "end_factor": 0.2}
    stages = PatchStages(schedule, **options)
    for step in (1, 5, 9, 10, 12, 29):
        expected = schedule.at(step).patch, 0.5 * schedule.lr_factor(step, 4, 0.5, 0.2)
        assert state_at(stages, step) == expected

    resumed = torch.optim.SGD([{"params": [parameter], "lr": 0.5}])
    resumed.load_state_dict(optimizer.state_dict())
    trainer.optimizers = [resumed]
    assert state_at(PatchStages(schedule, **options), 15) == (1, 0.5)
    with pytest.raises(IndexError):
        state_at(stages, 30)
