"""Inputs as they are in training: ids of which a few dominate, logits of which a few are large."""

import torch


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
