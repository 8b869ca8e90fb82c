"""A batch of a causal language model, folded from tokens to patches: labels, mask, positions, what separates documents.

Patch p holds the tokens ``p·K`` to ``p·K + K − 1`` of its row and predicts those of patch p + 1. What cannot be folded
is refused: a patch that straddles two documents, or text and padding on the left, would leak or dilute in silence.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import npp_kernels._checks as checks  # as a module, since its switch may change
from npp_kernels._checks import described

IGNORE_INDEX = -100
# Arguments that are folded into patches, or are not by token. Any other tensor is taken to hold one value a token.
FOLDED = ("input_ids", "labels", "attention_mask", "position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")
LENGTHS = ("max_length_q", "max_length_k")
REFUSED = {
    "inputs_embeds": "input_ids, whose embeddings are averaged",
    "shift_labels": "labels that are not shifted, as the model itself takes them",
    "cache": "no cache in training",
    "past_key_values": "no cache in training",
}
_STRADDLES = (
    "expected every document to begin at a multiple of patch={patch}, got a patch that straddles two; PatchCollator "
    "pads each document to a multiple"
)


def check_shapes(inputs: dict[str, Any], patch: int) -> None:
    """Raise a ValueError where names or shapes show already that a batch cannot be folded; ``patch`` is above 1."""
    for name, expected in REFUSED.items():
        if inputs.get(name) is not None:
            raise ValueError(f"{name}: expected {expected}, with patch={patch}")
    ids, labels = inputs.get("input_ids"), inputs["labels"]
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ValueError(f"input_ids: expected [B, L], got {described(ids) if isinstance(ids, Tensor) else ids!r}")
    batch, length = ids.shape
    if length % patch or length < 2 * patch:
        raise ValueError(
            f"input_ids: expected a length that is a multiple of patch={patch} and holds at least two patches, got "
            f"{length}; PatchCollator pads to a multiple"
        )
    if labels.shape != ids.shape:
        raise ValueError(f"labels: expected the shape of input_ids, {tuple(ids.shape)}, got {described(labels)}")
    for name in ("attention_mask", "position_ids", "seq_idx"):
        value = inputs.get(name)
        if value is None:
            continue
        shapes = [(batch, length)] if name == "attention_mask" else [(batch, length), (1, length)]
        if not isinstance(value, Tensor) or tuple(value.shape) not in shapes:
            got = described(value) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: expected [{batch}, {length}], one value for each token, got {got}")
    if inputs.get("cu_seq_lens_q") is not None and inputs.get("position_ids") is None:
        raise ValueError(
            "position_ids: expected them together with cu_seq_lens_q, since they tell where documents begin"
        )
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.ndim > 0 and name not in FOLDED:
            raise ValueError(f"{name}: expected None with patch={patch}, since it cannot be folded to patches")


def fold(inputs: dict[str, Any], patch: int) -> dict[str, Any]:
    """Return the batch by patches: ``labels [B, P, K]``, already shifted, and the rest; without ``input_ids``."""
    folded = dict(inputs)
    ids = folded.pop("input_ids")
    folded["labels"] = shifted_groups(inputs, patch)
    if patch == 1:
        return folded
    for name in ("attention_mask", "seq_idx"):
        if folded.get(name) is not None:
            folded[name] = folded[name][:, ::patch]
    if folded.get("position_ids") is not None:
        folded["position_ids"] = (folded["position_ids"][:, ::patch] // patch).expand(ids.shape[0], -1)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", *LENGTHS):
        if folded.get(name) is not None:
            folded[name] = folded[name] // patch
    return folded


def shifted_groups(inputs: dict[str, Any], patch: int) -> Tensor:
    """Return what each patch predicts, the labels of the next: ``[B, L] -> [B, P, K]``, -100 where nothing counts.

    The first patch of a document counts nowhere, as the first token of a document does not: nothing precedes it.
    """
    labels = inputs["labels"]
    groups = labels.unflatten(1, (-1, patch))
    if patch > 1:
        begins = _document_begins(inputs, patch)
        if begins is not None:
            groups = groups.masked_fill(begins.unsqueeze(-1), IGNORE_INDEX)
    return F.pad(groups[:, 1:], (0, 0, 0, 1), value=IGNORE_INDEX)


def _document_begins(inputs: dict[str, Any], patch: int) -> Tensor | None:
    """Return which patches a document begins with: ``[B or 1, P]``; None where the batch does not tell."""
    positions: Tensor | None = inputs.get("position_ids")
    index: Tensor | None = inputs.get("seq_idx")
    if positions is not None:
        return positions[:, ::patch] == 0
    if index is not None:
        return F.pad(index[:, ::patch].diff(dim=1) != 0, (1, 0))
    return None


def find_faults(inputs: dict[str, Any], patch: int) -> list[tuple[Tensor, str]]:
    """Return pairs of a 0-d bool, true where the batch's values make folding wrong, and what to say then."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    counted = labels != IGNORE_INDEX
    shifted = (~counted[:, :-1] | (labels[:, :-1] == ids[:, 1:])).all() & (counted & (labels != ids)).any()
    faults = [
        (shifted, "labels: expected labels that are not shifted, as the model itself takes them, got the next token")
    ]
    mask = inputs.get("attention_mask")
    if mask is not None:
        groups = mask.unflatten(1, (-1, patch))
        first, last = groups[..., 0] != 0, groups[..., -1] != 0
        rises = (groups[..., 1:] > groups[..., :-1]).any()
        follows = (((first & ~last).cumsum(1) > 0)[:, :-1] & first[:, 1:]).any()
        advice = f"expected padding on the right, or on the left by a multiple of patch={patch}, got"
        faults.append(
            (rises | follows, f"attention_mask: {advice}, got a patch of padding and text with text after it")
        )
        faults.append(((mask > 1).any(), "attention_mask: expected 0 and 1, got a greater value"))
    if inputs.get("position_ids") is not None:
        groups = inputs["position_ids"].unflatten(1, (-1, patch))
        places = torch.arange(patch, device=groups.device)
        bad = (groups != groups[..., :1] + places) | (groups[..., :1] % patch != 0)
        if mask is not None:
            bad = bad & (mask.unflatten(1, (-1, patch)) != 0)  # padding may have any position
        faults.append((bad.any(), f"position_ids: {_STRADDLES.format(patch=patch)}"))
    if inputs.get("seq_idx") is not None:
        groups = inputs["seq_idx"].unflatten(1, (-1, patch))
        faults.append(((groups != groups[..., :1]).any(), f"seq_idx: {_STRADDLES.format(patch=patch)}"))
    faults += [
        ((inputs[name] % patch != 0).any(), f"{name}: {_STRADDLES.format(patch=patch)}")
        for name in ("cu_seq_lens_q", "cu_seq_lens_k")
        if inputs.get(name) is not None
    ]
    return faults


def raise_fault(faults: list[tuple[Tensor, str]]) -> None:
    """Raise the first fault as a ValueError; waits for the GPU once."""
    found = torch.stack([fault for fault, _ in faults]).tolist()
    for (_, message), wrong in zip(faults, found, strict=True):
        if wrong:
            raise ValueError(message)


def can_look(tensor: Tensor) -> bool:
    """Return whether values may be looked at on the host, by the rule of `npp_kernels.check_ids`."""
    if torch.compiler.is_compiling() or tensor.is_meta:
        return False
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return tensor.device.type == "cpu" or checks._ids_are_checked


def divisor(groups: Tensor, normalize: str, slot_weights: Tensor | None) -> Tensor:
    """Return what a batch adds to the divisor of its step's loss: 0-d, or for ``"slot"`` one count for each slot.

    The sum over micro-batches and ranks, given to each as ``num_targets``, makes their losses add up to that of one
    big batch.
    """
    counted = groups != IGNORE_INDEX
    if normalize == "row":
        return counted.any(-1).sum()
    slots = counted.flatten(0, -2).sum(0)
    if normalize == "slot":
        return slots
    return slots.sum() if slot_weights is None else (slots * slot_weights.to(slots.device)).sum()


def loss_options(
    groups: Tensor, num_targets: Tensor | float | None, normalize: str, slot_weights: Tensor | None
) -> tuple[dict[str, Any], Tensor | None]:
    """Return options of the losses, and a factor where not None, for a batch that is part of a step.

    ``num_targets`` is the sum of the step's `divisor`.
    """
    options: dict[str, Any] = {"normalize": normalize, "slot_weights": slot_weights}
    if num_targets is None:
        return options, None
    if normalize == "target":
        return {**options, "num_targets": num_targets}, None
    if normalize == "row":
        return options, divisor(groups, "row", None) / num_targets
    counts = torch.as_tensor(num_targets, device=groups.device).float().view(-1)
    weights = torch.ones_like(counts) if slot_weights is None else slot_weights.to(groups.device)
    in_use = (weights * (counts > 0)).sum()
    each = weights / torch.where(counts > 0, counts, 1) / torch.where(in_use > 0, in_use, 1)
    return {"reduction": "sum", "slot_weights": each}, None
