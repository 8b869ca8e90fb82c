"""Rows of packed documents, regrouped so that no patch holds tokens of two of them.

Trainers of language models pack documents into rows of a fixed length, with a position that restarts at 0 where a
document begins, and a label for every token: the token after it. A patch grid laid over such a row would average the
end of one document with the start of the next. Here every document starts a patch of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from npp_kernels._checks import check_integer_dtype, check_tensor, described

IGNORE_INDEX = -100


def group_packed(
    tokens: Tensor, labels: Tensor, patch: int, *, positions: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Group packed rows: ``tokens [B, L], labels [B, L] -> groups, targets [B, P, K], positions [B, P]``.

    >>> import torch
    >>> tokens = torch.tensor([[1, 2, 3, 4, 5, 7, 8, 9]])  # two documents
    >>> labels = torch.tensor([[2, 3, 4, 5, 6, 8, 9, 10]])
    >>> groups, targets, positions = group_packed(tokens, labels, 2, positions=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]]))
    >>> groups.tolist(), positions.tolist()
    ([[[1, 2], [3, 4], [7, 8], [0, 0]]], [[0, 1, 0, 0]])
    >>> targets.tolist()
    [[[3, 4], [5, 6], [9, 10], [-100, -100]]]

    Row p of ``targets`` holds the K tokens after group p, as far as the row knows them, so that a loss needs no shift
    and may be cut anywhere along P. Patches stand one after another from the left of the row. A document of n tokens
    has ``⌊n / K⌋`` of them: the last ``n mod K`` tokens predict nothing, and are targets only. What that frees at the
    right of the row is padding: id 0, position 0, nothing to predict.

    Args:
        tokens: ids, int32 or int64.
        labels: the token after each token, -100 where it does not count.
        patch: K, tokens of a patch.
        positions: the place of each token in its document; 0 begins another. None: every row is one document.

    Returns:
        Groups and targets of the dtypes of ``tokens`` and ``labels``, and the place of each group in its document,
        counted in groups. ``P = L / K``.

    Raises:
        TypeError: a tensor is not one, or holds no integers.
        ValueError: shapes differ, ``patch`` does not divide L, or a label is not the token after its token.

    Memory:
        A few tensors of the size of ``tokens``. Looking at the labels waits for the device that they are on: this is
        meant for batches on the CPU, on their way to the model.
    """
    for name, tensor in (("tokens", tokens), ("labels", labels), ("positions", positions)):
        if tensor is None:
            continue
        check_tensor(name, tensor)
        check_integer_dtype(name, tensor)
        if tensor.ndim != 2 or tensor.shape != tokens.shape:
            raise ValueError(f"{name}: expected [B, L] as tokens, {tuple(tokens.shape)}, got {described(tensor)}")
    length = tokens.shape[1]
    if patch < 1 or length < 1 or length % patch:
        raise ValueError(f"patch: expected a size that divides the row length {length}, got {patch}")

    index = torch.arange(length, device=tokens.device).expand_as(tokens)
    begins = index == 0 if positions is None else (positions == 0) | (index == 0)
    start = index.where(begins, 0).cummax(dim=1).values
    following = F.pad(index.where(begins, length)[:, 1:], (0, 1), value=length)
    end = following.flip(1).cummin(dim=1).values.flip(1)  # where the next document begins, or the row ends
    _check_shifted(tokens, labels, index, end)

    # A group's targets are the labels that begin K − 1 places after its first token.
    ahead = index + (patch - 1)
    targets = labels.gather(1, ahead.clamp(max=length - 1)).where(ahead < end, IGNORE_INDEX)

    whole = index - start < (end - start) // patch * patch
    order = torch.argsort(whole.logical_not(), dim=1, stable=True)  # the tokens of whole patches first
    whole = whole.gather(1, order)
    groups = tokens.gather(1, order).where(whole, 0)
    targets = targets.gather(1, order).where(whole, IGNORE_INDEX)
    places = ((index - start) // patch).gather(1, order).where(whole, 0)
    return groups.unflatten(1, (-1, patch)), targets.unflatten(1, (-1, patch)), places[:, ::patch]


def _check_shifted(tokens: Tensor, labels: Tensor, index: Tensor, end: Tensor) -> None:
    """Refuse labels that are not the tokens one ahead: grouping them would shift twice, or not at all."""
    inside = (index + 1 < end)[:, :-1]
    wrong = inside & (labels[:, :-1] != IGNORE_INDEX) & (labels[:, :-1] != tokens[:, 1:])
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"labels: expected the token after each token, {int(tokens[row, column + 1])} at [{row}, {column}], "
            f"got {int(labels[row, column])}"
        )
