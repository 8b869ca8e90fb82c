"""What a loss on logits must return for a case: the reference in fp64, with eager PyTorch's error as the measure.

Rows with a NaN or a positive infinity, and rows that are -inf throughout, are broken: what comes of them is NaN, as
with `F.cross_entropy`, and nothing of it may reach another row.
"""

import functools
import re

import pytest
import torch

import npp_kernels
import reference.ops as reference
from tests import fuzz_compare
from tests.fuzz_cases import laid_out, make_ids, make_logits, make_options, make_upstream

EPS = torch.finfo(torch.float32).eps


def find_broken(logits, softcap):
    """Return which rows of logits have no softmax; a cap makes infinities finite."""
    broken = logits.isnan().any(1)
    if softcap is None:
        broken = broken | (logits == float("inf")).any(1) | (logits == float("-inf")).all(1)
    return broken


def terms_of(logits, targets, options, upstream, *, exactly=False):
    """Return how large what is summed is, in fp64: of each target's loss, of the whole loss, of each row's gradient.

    A row's gradient is ``S · softmax − coefficients − what smoothing takes``. At a target with more than half of the
    softmax what cancels there can be left out beforehand, and is no term; ``exactly`` as autograd has it, it is one.

    Returns:
        ``[N, K]``, ``[]``, ``[N, 1]``; and the rows' weight with the upstream, ``[N]``, 0 where no gradient is due.
    """
    softcap, smoothing = options.get("softcap"), options.get("label_smoothing", 0.0)
    z = logits.double()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    counted = targets != options["ignore_index"]
    safe = targets.masked_fill(~counted, 0).long()
    vocab_size = logits.shape[1]
    by_id = options.get("class_weight")
    by_id = z.new_ones(vocab_size) if by_id is None else by_id.double()
    class_weights = by_id[safe]
    maximum, log_softmax = z.max(1, keepdim=True).values, z.log_softmax(1)
    p = log_softmax.exp()
    nll = -log_softmax.gather(1, safe)
    losses = (1 - smoothing) * class_weights * nll
    if smoothing:
        losses = losses + smoothing * (by_id * -log_softmax).mean(1, keepdim=True)
    losses = losses.nan_to_num(0, 0, 0) + (softcap or 0.0)
    size = maximum.abs() + (torch.logsumexp(z, 1, keepdim=True) - maximum)

    weights = counted.double()
    if options.get("slot_weights") is not None:
        weights = weights * torch.as_tensor(options["slot_weights"], dtype=z.dtype, device=z.device)
    if options.get("reduction", "mean") == "mean":
        count = options.get("num_targets")
        weights = reference.coefficients(weights, class_weights, counted, options["normalize"], count)
    if options.get("token_scaling"):
        scaling = p.gather(1, safe) * (1 + nll.nan_to_num(0, 0, 0))  # an exponential is off by its argument's rounding
        losses = losses * scaling
    penalty = options.get("z_loss", 0.0) * counted.any(1).double()
    if options.get("reduction", "mean") == "mean":
        penalty = penalty / counted.any(1).sum().clamp(min=1)
    penalty = penalty.unsqueeze(1)
    whole = ((weights * losses).sum() + (penalty * size.square()).nan_to_num(0, 0, 0).sum()).nan_to_num(0, 0, 0)

    if options.get("token_scaling"):
        weights = weights * scaling
    weights = weights * upstream.double().abs()
    slope = 2 * penalty * size * (upstream.double().abs() if upstream.ndim == 0 else 0)
    at_targets = (1 - smoothing) * weights * class_weights
    spread = smoothing / vocab_size * weights.sum(1, keepdim=True) * by_id
    surplus = spread.sum(1, keepdim=True) + slope
    taken = torch.zeros_like(z).scatter_add(1, safe, at_targets)
    total = at_targets.sum(1, keepdim=True) + surplus
    terms = total * p + taken + spread
    sure = (total - taken) + spread + total * (-torch.expm1(log_softmax))
    terms = torch.where((p > 0.5) & (taken > 0), sure, terms)
    terms = torch.maximum(terms, total) if exactly else terms
    terms = terms.amax(1, keepdim=True) * max(softcap or 1.0, 1.0)
    return losses, whole, terms, (weights.sum(1) + slope.squeeze(1))


def run_logits(function, logits, groups, upstream, options):
    """Return loss, gradient and statistics; the logits are a leaf with the strides that they have."""
    logits = logits.requires_grad_()
    loss, stats = function(logits, groups, **options)
    (grad,) = torch.autograd.grad(loss, logits, upstream.to(loss.dtype).expand(loss.shape))
    return loss.detach(), grad, stats


def make_loss_call(case, device):
    """Return logits ``[..., V]``, groups, upstream and options of a case, on the device."""
    torch.manual_seed(case.seed)
    vocab_size, group_size = case.sizes
    groups = make_ids(case.targets, (*case.leading, group_size), vocab_size, case.ignore_index)
    if groups.ndim > 1 and case.layouts[1] == "expanded":
        groups = laid_out(groups, "expanded")  # before the logits that suit it
    rows = make_logits(case, groups.reshape(-1, group_size))
    logits = rows.view(*case.leading, vocab_size).to(case.dtype)
    shape = groups.shape if case.options[0] == "none" else ()
    upstream = make_upstream(case.upstream, shape)
    options = make_options(case, group_size, vocab_size)
    options = {name: value.to(device) if torch.is_tensor(value) else value for name, value in options.items()}
    groups = groups.int() if case.small_ids else groups
    layouts = [layout if layout != "expanded" or logits.ndim > 1 else "contiguous" for layout in case.layouts]
    logits = laid_out(logits.to(device), layouts[0])
    groups, upstream = laid_out(groups.to(device), layouts[1]), laid_out(upstream.to(device), layouts[2])
    return logits, groups, upstream, options


def check_loss(case, device):
    """Check `patch_cross_entropy` on a case."""
    logits, groups, upstream, options = make_loss_call(case, device)
    compare = functools.partial(fuzz_compare.compare, rows_differ=case.rows_differ())
    inplace = case.inplace and not (case.layouts[0] == "expanded" and logits.numel())
    kept, kept_groups = logits.clone(), groups.clone()
    flat, targets = kept.reshape(-1, kept.shape[-1]), groups.reshape(-1, groups.shape[-1])
    broken = find_broken(flat, options.get("softcap"))
    clean = flat.masked_fill(broken.unsqueeze(1), 0).view(kept.shape)
    wide = torch.promote_types(case.dtype, torch.float32)
    eager = run_logits(reference.patch_cross_entropy, clean.to(wide), groups.long(), upstream, options)
    oracle = run_logits(reference.patch_cross_entropy, clean.double(), groups.long(), upstream, options)
    row_upstream = upstream if upstream.ndim == 0 else upstream.reshape(targets.shape)
    exactly = case.dtype == torch.float64  # the oracle is no more than that
    loss_terms, whole_term, grad_terms, due = terms_of(
        clean.view(flat.shape), targets, options, row_upstream, exactly=exactly
    )

    ours = options | {"inplace_backward": inplace, "return_stats": True}
    loss, grad, stats = run_logits(npp_kernels.patch_cross_entropy, logits, groups, upstream, ours)
    if not case.stats:  # which are found in the same pass, or not
        logits = laid_out(kept, case.layouts[0]) if case.layouts[0] != "expanded" else kept.clone()
        leaf = logits.requires_grad_()
        alone = npp_kernels.patch_cross_entropy(leaf, groups, **options)
        again = torch.autograd.grad(alone, leaf, upstream.to(loss.dtype).expand(loss.shape))[0]
        torch.testing.assert_close(alone.detach(), loss, equal_nan=True)
        if not inplace:
            assert torch.equal(leaf.detach().nan_to_num(7), kept.nan_to_num(7))
        scale = grad_terms[due > 0].max().item() if (due > 0).any() else 0.0
        tolerance = 4 * torch.finfo(case.dtype).eps
        torch.testing.assert_close(again, grad, equal_nan=True, rtol=tolerance, atol=min(16 * EPS * scale, 1e30))
    if not inplace:
        assert torch.equal(logits.detach().nan_to_num(7), kept.nan_to_num(7)), "the caller's logits have changed"
    assert torch.equal(groups, kept_groups)

    row_grad, row_eager, row_oracle = (t[1].reshape(flat.shape) for t in ((loss, grad), eager, oracle))
    unit = row_eager.to(case.dtype)
    if inplace and case.dtype == torch.bfloat16 and upstream.ndim == 0:
        # In place the gradient is rounded in the forward, and again when the upstream turns out not to be 1.
        ones = torch.ones_like(upstream)
        unit = run_logits(reference.patch_cross_entropy, clean.to(wide), groups.long(), ones, options)[1]
        unit = unit.to(case.dtype).reshape(flat.shape) * upstream.to(case.dtype)
    whole = ~broken
    compare(row_grad[whole], unit[whole], row_oracle[whole], what="gradient", scale=grad_terms[whole])
    assert row_grad[broken & (due > 0)].isnan().all(), "the gradient of a broken row is not NaN"
    if upstream.ndim or upstream != 0:
        # Under token scaling 0 · NaN, the probability of a broken row, is NaN; it stays in that row.
        idle = (due == 0) & whole if options.get("token_scaling") else due == 0
        assert (row_grad[idle] == 0).all(), "a gradient where none is due"

    if loss.ndim:
        rows, exact, plainly = (t.reshape(targets.shape) for t in (loss, oracle[0], eager[0]))
        compare(
            rows[whole],
            plainly[whole],
            exact[whole],
            what="losses",
            scale=loss_terms[whole].amax() if whole.any() else 0.0,
        )
        counted = targets != options["ignore_index"]
        assert rows[broken][counted[broken]].isnan().all(), "the loss of a broken row is not NaN"
        assert (rows[~counted] == 0).all()
    else:
        # What a row weighs does not depend on the upstream; where that is 0 it does not show, and is not asked.
        if (broken & (due > 0)).any():
            assert loss.isnan(), "a broken row did not reach the loss"
        elif not broken.any() or upstream != 0:
            compare(loss, eager[0], oracle[0], what="loss", scale=whole_term)
    check_stats(stats, eager[2], oracle[2], flat, targets, whole, options, compare)


def check_stats(stats, eager, oracle, flat, targets, whole, options, compare):
    """Check the statistics of the rows that are whole."""
    cap = options.get("softcap") or 0.0
    for name in ("lse", "entropy"):
        values = [getattr(found, name).reshape(-1)[whole] for found in (stats, eager, oracle)]
        values[0:2] = values[0].float(), values[1].float()
        z = flat[whole].double()
        z = z if not cap else cap * torch.tanh(z / cap)
        size = z.amax(1).abs() + values[2].abs() + cap + 1 if name == "lse" else values[2].abs() + cap
        compare(*values, what=name, scale=size)
    prediction = stats.prediction.reshape(-1)
    assert ((prediction >= 0) & (prediction < flat.shape[1])).all()
    assert torch.equal(prediction[whole], flat[whole].argmax(1)), "predictions"
    hits = ((targets == prediction.unsqueeze(1)) & (targets != options["ignore_index"])).any(1)
    assert torch.equal(stats.accuracy.reshape(-1)[whole], hits[whole].to(stats.accuracy.dtype)), "accuracy"


def check_bad_id(case, device):
    """Check what one id out of range does: an IndexError on the CPU that names it; on a GPU NaN, and only there."""
    logits, groups, _, options = make_loss_call(case._replace(logits="peaky", layouts=("contiguous",) * 3), device)
    if not groups.numel():
        return
    vocab_size, dtype = case.sizes[0], groups.dtype
    bad = [vocab_size, -2, 2**30, torch.iinfo(dtype).min][case.seed % 4]
    place = case.seed % groups.numel()
    groups.view(-1)[place] = bad
    position = tuple(int(index) for index in torch.unravel_index(torch.tensor(place), groups.shape))
    if device.type == "cpu":
        words = f"groups: expected ids in [0, {vocab_size}), got {bad} at position {position}"
        for call in (
            lambda: npp_kernels.patch_cross_entropy(logits, groups, **options),
            lambda: npp_kernels.linear_patch_cross_entropy(
                logits, torch.eye(vocab_size, dtype=logits.dtype), groups, **options
            ),
            lambda: npp_kernels.group_mean(torch.zeros(vocab_size, 3), groups, ignore_index=case.ignore_index),
        ):
            with pytest.raises(IndexError, match=re.escape(words)):
                call()
        return
    options = {"ignore_index": case.ignore_index, "reduction": "none"}
    leaf = logits.requires_grad_()
    losses = npp_kernels.patch_cross_entropy(leaf, groups, **options)
    expected = torch.zeros(groups.numel(), dtype=torch.bool, device=device)
    expected[place] = True
    if case.dtype == torch.float64:
        return  # PyTorch's own gather asserts, which ends the process; see the docs
    assert torch.equal(losses.isnan().flatten(), expected)
    (grad,) = torch.autograd.grad(losses, leaf, torch.ones_like(losses))
    rows = expected.view(-1, groups.shape[-1]).any(1)
    assert torch.equal(grad.reshape(-1, vocab_size).isnan().all(1), rows)
    assert grad.reshape(-1, vocab_size)[~rows].isfinite().all()
    table = torch.zeros(vocab_size, 3, device=device, requires_grad=True)
    means = npp_kernels.group_mean(table, groups, ignore_index=case.ignore_index)
    assert torch.equal(means.isnan().any(-1).flatten(), rows)
