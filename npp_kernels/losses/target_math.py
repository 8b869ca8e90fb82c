"""Device functions on the targets of one row: who counts, with which weight, and what that makes of its gradient.

A kernel loads the ids of its row itself and hands on the ids, not the pointer: torch.compile believes that a pointer is
written to where it goes into a function that returns an address.
"""

import triton
import triton.language as tl

from npp_kernels._triton_math import cap_derivative, exp


@triton.jit
def find_weights(targets, slots, slot_scale_ptr, class_weight_ptr, vocab_size, ignore_index, GROUP_SIZE: tl.constexpr):
    """Return what a row's targets weigh by their slot and by their id; who counts; who is valid.

    The weight by slot is 0 where a target is ignored, and NaN where it is out of range.
    """
    slot_mask = slots < GROUP_SIZE
    counted = slot_mask & (targets != ignore_index)
    in_range = counted & (targets >= 0) & (targets < vocab_size)
    weights = tl.where(counted, 1.0, 0.0)
    if slot_scale_ptr is not None:
        scale = tl.load(slot_scale_ptr + slots, mask=slot_mask, other=0.0)
        weights = tl.where(counted, scale, 0.0)
    weights = tl.where(counted & (in_range == 0), float("nan"), weights)
    class_weights = tl.full(weights.shape, 1.0, tl.float32)
    if class_weight_ptr is not None:
        class_weights = tl.load(class_weight_ptr + targets, mask=in_range, other=1.0)
    return weights, class_weights, counted, in_range


@triton.jit
def load_totals(totals_ptr, NUM_PARTIALS: tl.constexpr, BLOCK_PARTIALS: tl.constexpr):
    """Return the weight of all targets and the number of rows with one; 1 for 0, so that nothing is divided by 0."""
    weight = tl.full([], 1.0, tl.float32)
    rows = tl.full([], 1.0, tl.float32)
    if totals_ptr is not None:
        partials = tl.arange(0, BLOCK_PARTIALS)
        mask = partials < NUM_PARTIALS
        weight = tl.sum(tl.load(totals_ptr + partials, mask=mask, other=0.0), axis=0)
        rows = tl.sum(tl.load(totals_ptr + NUM_PARTIALS + partials, mask=mask, other=0.0), axis=0)
    return tl.where(weight == 0, 1.0, weight), tl.where(rows == 0, 1.0, rows)


@triton.jit
def find_divisor(row_weight, totals, NORMALIZE: tl.constexpr):
    """Return what a row's weights are divided by to become its coefficients."""
    divisor = tl.full([], 1.0, tl.float32)
    if NORMALIZE == "target":
        divisor = totals[0]
    elif NORMALIZE == "row":
        divisor = tl.where(row_weight == 0, 1.0, row_weight) * totals[1]
    return divisor


@triton.jit
def find_penalty(counted, totals, z_loss):
    """Return what multiplies the squared lse of a row; 0 for a row without a target."""
    penalty = 0.0
    if z_loss is not None:
        scale = tl.cast(z_loss, tl.float32) / totals[1]  # torch.compile passes Python numbers as fp64
        penalty = tl.where(tl.max(counted.to(tl.int32), axis=0) > 0, scale, 0.0)
    return penalty


@triton.jit
def sum_equal_weights(
    groups_row, targets, weights, slots,
    GROUP_SIZE: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
):  # fmt: skip
    """Return for every target the weight of all targets of the row that equal it, itself included."""
    total = tl.zeros([BLOCK_SLOTS], tl.float32)
    for first in tl.static_range(0, BLOCK_SLOTS, BLOCK_OTHERS):
        others = first + tl.arange(0, BLOCK_OTHERS)
        other_targets = tl.load(groups_row + others, mask=others < GROUP_SIZE, other=-1).to(tl.int64)
        # Weights live in registers by slot; picking them by a one-hot sum keeps them there.
        picked = tl.sum(tl.where(slots[:, None] == others[None, :], weights[:, None], 0.0), axis=0)
        equal = (targets[:, None] == other_targets[None, :]) & (others < GROUP_SIZE)[None, :]
        total += tl.sum(tl.where(equal, picked[None, :], 0.0), axis=1)
    return total


@triton.jit
def smoothing_terms(label_smoothing, coefficient, class_weight_ptr, vocab_size):
    """Return what is left for the targets, 1 − ε; and of the rest ε Σ_j c_j what each logit gets, and all together."""
    rest = 1.0
    spread = 0.0
    whole = 0.0
    if label_smoothing is not None:
        smoothing = tl.cast(label_smoothing, tl.float32)
        rest = 1.0 - smoothing
        whole = smoothing * coefficient
        spread = whole / vocab_size
        if class_weight_ptr is not None:
            whole = spread * tl.load(class_weight_ptr + vocab_size)  # their sum stands behind them
    return rest, spread, whole


@triton.jit
def gradient_terms(weights, class_weights, divisor, penalty_slope, label_smoothing, class_weight_ptr, vocab_size):
    """Return what a row's gradient is made of: `gradient_at_targets` says what the parts are."""
    row_coefficient = tl.div_rn(tl.sum(weights, axis=0), divisor)
    smoothing_rest, spread, whole = smoothing_terms(label_smoothing, row_coefficient, class_weight_ptr, vocab_size)
    if class_weight_ptr is None:
        target_coefficient = row_coefficient
    else:
        target_coefficient = tl.div_rn(tl.sum(weights * class_weights, axis=0), divisor)
    surplus = whole + penalty_slope
    return smoothing_rest * target_coefficient + surplus, surplus, spread, smoothing_rest


@triton.jit
def times_class_weights(values, class_weight_ptr, offsets, mask):
    """Return values times the weights of their ids, where ids have weights."""
    if class_weight_ptr is not None:
        values = values * tl.load(class_weight_ptr + offsets, mask=mask, other=0.0)
    return values


@triton.jit
def has_no_target(weights, penalty, z_loss):
    """Return whether nothing in a row counts, so that its gradient is 0; for weights of at least 0, or NaN."""
    idle = tl.sum(weights, axis=0) == 0
    if z_loss is not None:
        idle = idle & (penalty == 0)
    return idle


@triton.jit
def gradient_away_from_targets(weighted_softmax, logits, spread, idle, softcap):
    """Return dz where no target is; a row without any target is 0, never NaN."""
    gradient = weighted_softmax - spread
    if softcap is not None:
        gradient = gradient * cap_derivative(logits, softcap)
    return tl.where(idle, 0.0, gradient)


@triton.jit
def gradient_at_targets(targets, row, target_logits, softcap, PRECISE: tl.constexpr):
    """Return dz at a row's targets, which are among all logits, but get less than the others.

    ``softmax_weight · p_t − equal coefficients``. Where a target is the one logit with more than half of the softmax,
    the two are nearly equal; there ``p_t = 1 − rest / (1 + rest)``, and what cancels is left out beforehand.

    Args:
        targets: how far each is below the row's maximum, and whether that is known; its weight, and that of all its
            equals; its weight by id alone.
        row: what weights are divided by; what multiplies the softmax, and which part of that is not from weights; what
            every logit loses to label smoothing; 1 − ε; the sum of exponentials without the maximum.
        target_logits: capped.
        softcap: see `capped`.
        PRECISE: see `exp`.
    """
    distances, known, weights, equal_weights, class_weights = targets
    divisor, softmax_weight, surplus, spread, smoothing_rest, rest = row
    softmax = exp(-distances, PRECISE) / (1.0 + rest)
    spread = spread * class_weights
    gradient = softmax_weight * softmax - spread - smoothing_rest * tl.div_rn(equal_weights, divisor)
    if rest < 1.0:
        sure = known & (distances == 0.0)
        others = tl.div_rn(tl.sum(tl.where(sure, 0.0, weights), axis=0), divisor)
        missing = softmax_weight * tl.div_rn(rest, 1.0 + rest)
        gradient = tl.where(sure, (smoothing_rest * others + surplus - spread) - missing, gradient)
    if softcap is not None:
        gradient = gradient * cap_derivative(target_logits, softcap)
    return gradient


@triton.jit
def store_at_targets(grad_row, targets, gradient, valid, idle):
    """Overwrite a row's gradient at its targets, after the rest of it was stored by other threads.

    Equal targets all store the same value, so that the order of the stores does not matter.
    """
    tl.debug_barrier()
    if idle == 0:
        tl.store(grad_row + targets, gradient.to(grad_row.dtype.element_ty), mask=valid)
