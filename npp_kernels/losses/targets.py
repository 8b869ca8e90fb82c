"""The targets of one call: their groups, and all that their coefficients are formed from, on the device.

    loss    = Σ_pj c_pj · (lse_p − z_p[t_pj])

The kernels form ``c_pj = scale_j · [t_pj counts] / divisor`` from a few numbers; `Settings.normalize` says which.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from npp_kernels._dispatch import can_overlap, cdiv, launch, next_power_of_2, runs_kernels
from npp_kernels.losses.options import LossOptions
from npp_kernels.vocabulary_shard import VocabularyShard

COUNT_BLOCK = 2048
MAX_PARTIALS = 32  # no more than a warp has threads: they are summed without a barrier
DUPLICATE_SLOTS = 16

# Slot weights are few; whoever makes new ones at each call must not fill the GPU with them. What is kept is kept for
# good: a CUDA graph may read it.
MAX_KEPT_WEIGHTS = 64
_kept_weights: dict[tuple[Any, ...], Tensor] = {}


class Settings(NamedTuple):
    """The options that the kernels take as plain numbers; None where an option is off."""

    ignore_index: int
    normalize: str
    """What a target's weight is divided by: ``"target"`` (the first total), ``"row"`` (the row's weight and the second
    total) or ``"none"``."""
    label_smoothing: float | None
    z_loss: float | None
    softcap: float | None
    token_scaling: bool


class Targets(NamedTuple):
    """What every kernel of a loss needs to know beside the logits."""

    groups: Tensor  # [N, K]
    slot_scale: Tensor | None  # [K]
    class_weight: Tensor | None  # [V + 1]: the weights by id, and their sum
    totals: Tensor | None  # [2, n]: partial sums of the targets' weight, and of the rows with a target
    settings: Settings
    shard: VocabularyShard | None = None  # where the logits are a slice of the vocabulary

    def weights_by_id(self) -> Tensor | None:
        """Return the weights of the ids whose logits are here."""
        if self.class_weight is None:
            return None
        return self.class_weight[:-1] if self.shard is None else self.class_weight[self.shard.start : self.shard.stop]

    @property
    def is_plain(self) -> bool:
        """Whether nothing but the upstream gradient decides what the targets weigh, and no option adds to that."""
        settings = self.settings
        options = (settings.label_smoothing, settings.z_loss, settings.softcap)
        return all(part is None for part in (self.slot_scale, self.class_weight, self.totals, *options))

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Return all but the settings; torch.compile of torch 2.8 cannot cut a named tuple."""
        return self.groups, self.slot_scale, self.class_weight, self.totals

    def rows(self, chunk: slice) -> Targets:
        """Return the targets of some rows."""
        if chunk.stop - chunk.start == self.groups.shape[0]:
            return self
        return self._replace(groups=self.groups[chunk])

    def constants(self) -> dict[str, Any]:
        """Return the kernels' fixed parameters that describe a group and the totals."""
        group_size = self.groups.shape[1]
        block_slots = next_power_of_2(group_size)
        num_partials = 1 if self.totals is None else self.totals.shape[1]
        return {
            "NORMALIZE": self.settings.normalize,
            "GROUP_SIZE": group_size,
            "BLOCK_SLOTS": block_slots,
            "BLOCK_OTHERS": min(block_slots, DUPLICATE_SLOTS),
            "NUM_PARTIALS": num_partials,
            "BLOCK_PARTIALS": next_power_of_2(num_partials),
        }


@triton.jit(do_not_specialize=["ignore_index", "vocab_size"])
def _count_targets_kernel(
    groups_ptr,  # [num_rows, GROUP_SIZE]
    slot_weights_ptr,  # [GROUP_SIZE] or None
    class_weight_ptr,  # [vocab_size + 1] or None
    totals_ptr,  # [2, num_programs] out: the weight of the targets that count, and the rows that have one
    ticket_ptr,  # [1] out: 0, for the kernel of the loss to count its programs in
    num_rows,
    vocab_size,
    ignore_index,
    GROUP_SIZE: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program counts every num_programs-th block of BLOCK_ROWS rows.

    With OVERLAP it lets the kernel of the loss start at once. It must not be launched early itself: when it runs, all
    before it must have ended, the logits among it, which the next kernel reads without waiting.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    slots = tl.arange(0, BLOCK_SLOTS)
    slot_mask = slots < GROUP_SIZE
    weights = tl.full([BLOCK_SLOTS], 1.0, tl.float32)
    if slot_weights_ptr is not None:
        weights = tl.load(slot_weights_ptr + slots, mask=slot_mask, other=0.0)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    rows_with_target = tl.zeros([BLOCK_ROWS], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_ROWS), tl.num_programs(0)):
        rows = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (rows < num_rows)[:, None] & slot_mask[None, :]
        targets = tl.load(groups_ptr + rows[:, None] * GROUP_SIZE + slots[None, :], mask=mask, other=0).to(tl.int64)
        counted = tl.where(mask & (targets != ignore_index), 1.0, 0.0)
        rows_with_target += tl.max(counted, axis=1)
        if class_weight_ptr is not None:
            in_range = (counted > 0) & (targets >= 0) & (targets < vocab_size)
            counted *= tl.load(class_weight_ptr + targets, mask=in_range, other=1.0)
        total += tl.sum(counted * weights[None, :], axis=1)
    tl.store(totals_ptr + tl.program_id(0), tl.sum(total, axis=0))
    tl.store(totals_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(rows_with_target, axis=0))
    if tl.program_id(0) == 0:
        tl.store(ticket_ptr, 0)


def _count_targets(
    groups: Tensor, slot_weights: Tensor | None, class_weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Return partial totals ``[2, n]`` over ``groups [N, K]``, and a fresh ticket for the next kernel."""
    num_rows, group_size = groups.shape
    block_slots = next_power_of_2(group_size)
    block_rows = max(COUNT_BLOCK // block_slots, 1)
    programs = max(min(cdiv(num_rows, block_rows), MAX_PARTIALS), 1)
    totals = torch.empty((2, programs), dtype=torch.float32, device=groups.device)
    ticket = torch.empty(1, dtype=torch.int32, device=groups.device)
    launch(
        _count_targets_kernel,
        (programs,),
        groups,
        slot_weights,
        class_weight,
        totals,
        ticket,
        num_rows,
        0 if class_weight is None else class_weight.shape[0] - 1,
        ignore_index,
        GROUP_SIZE=group_size,
        BLOCK_SLOTS=block_slots,
        BLOCK_ROWS=block_rows,
        OVERLAP=can_overlap(groups),
    )
    return totals, ticket


def _class_weights_of(groups: Tensor, counted: Tensor, class_weight: Tensor) -> Tensor:
    """Return the weight of each target by its id, 0 where ignored; what is out of range gets some weight."""
    ids = groups.clamp(0, class_weight.shape[0] - 2)
    return class_weight[ids.long()] * counted


def _torch_totals(
    groups: Tensor, slot_weights: Tensor | None, class_weight: Tensor | None, ignore_index: int, wide: torch.dtype
) -> Tensor:
    """`_count_targets` in PyTorch: totals ``[2, 1]``."""
    counted = groups != ignore_index
    weight = counted if class_weight is None else _class_weights_of(groups, counted, class_weight)
    if slot_weights is not None:
        weight = weight * slot_weights
    return torch.stack([weight.sum(dtype=wide), counted.any(1).sum(dtype=wide)]).view(2, 1)


def _constant_tensor(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return weights as a tensor; those from Python stay on the device, so that only the first call copies them.

    A copy to a GPU makes the host wait, and cannot be captured in a CUDA graph.
    """
    if isinstance(values, Tensor):
        return values.detach().to(device, dtype).contiguous()
    key = (*map(float, values), dtype, device)
    tensor = None if torch.compiler.is_compiling() else _kept_weights.get(key)
    if tensor is None:
        with torch.inference_mode(False):
            tensor = torch.tensor(key[:-2], dtype=dtype, device=device)
        keeps = type(tensor) is Tensor and not torch.compiler.is_compiling()
        if keeps and len(_kept_weights) < MAX_KEPT_WEIGHTS:
            _kept_weights[key] = tensor
    return tensor


def find_targets(
    groups: Tensor, options: LossOptions, like: Tensor, shard: VocabularyShard | None = None
) -> tuple[Targets, Tensor | None]:
    """Return the targets of a call from ``groups [N, K]``, in the accumulation dtype and on the device of ``like``.

    The second result, if any, is a ticket for the kernel of the loss: it tells that the counting was launched last.
    """
    wide = torch.promote_types(like.dtype, torch.float32)
    ignore_index, normalize = options.ignore_index, options.normalize
    slot_scale = class_weight = totals = ticket = None
    if options.slot_weights is not None:
        slot_scale = _constant_tensor(options.slot_weights, wide, like.device)
    if options.class_weight is not None:
        weights = options.class_weight.detach().to(wide)
        class_weight = torch.cat([weights, weights.sum(0, keepdim=True)])
    if options.reduction != "mean":
        normalize = "none"
    elif (normalize != "slot" and options.num_targets is None) or options.z_loss:
        if runs_kernels(like):
            totals, ticket = _count_targets(groups, slot_scale, class_weight, ignore_index)
        else:
            totals = _torch_totals(groups, slot_scale, class_weight, ignore_index, wide)
    if options.num_targets is not None:
        ticket = None
        if totals is None:
            totals = torch.ones((2, 1), dtype=wide, device=like.device)
        else:
            totals[0].zero_()
        totals[0, :1] = options.num_targets
    if normalize == "slot":
        normalize, ticket = "none", None
        slot_scale = _scale_by_slot(groups, slot_scale, class_weight, ignore_index, wide)
    settings = Settings(
        ignore_index,
        normalize,
        options.label_smoothing or None,
        options.z_loss or None,
        options.softcap,
        options.token_scaling,
    )
    return Targets(groups, slot_scale, class_weight, totals, settings, shard), ticket


def _scale_by_slot(
    groups: Tensor, slot_weights: Tensor | None, class_weight: Tensor | None, ignore_index: int, wide: torch.dtype
) -> Tensor:
    """Return ``w_j / (the slot's targets) / (the weight of all slots that have a target)``, ``[K]``."""
    counted = groups != ignore_index
    in_use = counted.any(0)
    counts = (
        counted.sum(0).to(wide) if class_weight is None else _class_weights_of(groups, counted, class_weight).sum(0)
    )
    weights = torch.ones_like(counts) if slot_weights is None else slot_weights
    weight_in_use = (weights * in_use).sum()
    weight_in_use = torch.where(weight_in_use == 0, 1, weight_in_use)
    return weights / torch.where(counts == 0, 1, counts) / weight_in_use
