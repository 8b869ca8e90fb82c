"""Inputs as they are in training: ids of which a few dominate, logits of which a few are large; options of a loss."""

import torch

SLOT_WEIGHTS = (1.0, 0.5, 0.25, 2.0)
LOSS_OPTIONS = [
    {},
    {"normalize": "row"},
    {"normalize": "slot"},
    {"slot_weights": SLOT_WEIGHTS},
    {"normalize": "row", "slot_weights": torch.tensor(SLOT_WEIGHTS)},
    {"normalize": "slot", "slot_weights": SLOT_WEIGHTS, "z_loss": 0.1},
    {"reduction": "sum", "slot_weights": SLOT_WEIGHTS, "z_loss": 0.01},
    {"reduction": "none"},
    {"reduction": "none", "label_smoothing": 0.1, "softcap": 5.0},
    {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0},
    {"num_targets": 7},
    {"num_targets": torch.tensor(70.0), "z_loss": 0.1},
    {"normalize": "row", "z_loss": 0.1, "label_smoothing": 1.0},
    {"token_scaling": True},
    {"token_scaling": True, "normalize": "row", "label_smoothing": 0.1, "softcap": 5.0, "z_loss": 0.01},
    {"token_scaling": True, "reduction": "none"},
]


def skewed_ids(vocab_size, shape, *, dtype=torch.int64, device="cpu"):
    """Return ids of which about a fifth is one id, and the rest ever rarer."""
    uniform = torch.rand(shape, device=device)
    ids = (vocab_size * uniform.pow(3)).long().clamp(max=vocab_size - 1)
    ids[torch.rand(shape, device=device) < 0.2] = vocab_size // 2
    return ids.to(dtype)


def peaky_logits(num_rows, vocab_size, *, dtype=torch.float32, device="cpu"):
    """Return logits with a standard deviation of 3 and a few that stand out."""
    logits = 3 * torch.randn(num_rows, vocab_size, device=device)
    peaks = torch.randint(vocab_size, (num_rows, 2), device=device)
    return logits.scatter_add_(1, peaks, 8 * torch.rand(num_rows, 2, device=device)).to(dtype)


def make_groups(vocab_size, num_rows, group_size, device, *, ignored=0.2):
    groups = skewed_ids(vocab_size, (num_rows, group_size), device=device)
    groups[torch.rand(groups.shape, device=device) < ignored] = -100
    if num_rows > 2 and ignored:
        groups[1] = -100
    return groups
