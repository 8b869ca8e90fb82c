"""What the loss on hidden states must return for a case; its logits are products, which eager PyTorch rounds too.

test_fuzz.py calls it for each case that fuzz_cases.py makes up.
"""

import functools

import hypothesis
import torch

import npp_kernels
import reference.ops as reference
from tests import fuzz_compare
from tests.budget import rounded_scale
from tests.conftest import TORCH_2_8
from tests.fuzz_cases import laid_out, make_ids, make_options, make_upstream
from tests.fuzz_losses import terms_of


class _Rounded:
    """The reference with the logits and their gradient rounded, as `F.linear` in the inputs' dtype does."""

    def __init__(self, dtype):
        self.dtype = dtype

    def __call__(self, hidden, weight, groups, *, bias=None, **options):
        logits = torch.nn.functional.linear(hidden, weight, bias)
        return reference.patch_cross_entropy(logits.to(self.dtype).to(hidden.dtype), groups, **options)


def run_linear(function, inputs, wanted, call, options):
    """Return loss and gradients, None where none is wanted, and the statistics."""
    groups, upstream = call
    leaves = [
        None if tensor is None else tensor.detach().requires_grad_(want)
        for tensor, want in zip(inputs, wanted, strict=True)
    ]
    loss, stats = function(leaves[0], leaves[1], groups, bias=leaves[2], **options)
    differentiable = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    found = iter(torch.autograd.grad(loss, differentiable, upstream.to(loss.dtype).expand(loss.shape)))
    grads = [next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves]
    return loss.detach(), grads, stats


def make_layer(case, targets):
    """Return hidden states ``[N, D]``, weight and bias in fp32, for what the case says of the logits."""
    (num_rows, _), (vocab_size, _), size = targets.shape, case.loss.sizes, case.hidden_size
    hidden = torch.randn(num_rows, size)
    weight = torch.randn(vocab_size, size) * 3 / size**0.5
    bias = torch.randn(vocab_size) if case.bias else None
    safe = targets.masked_fill(targets == case.loss.ignore_index, 0)
    if case.loss.logits == "constant":
        weight = weight[:1].expand(vocab_size, size).clone()
        bias = None if bias is None else torch.full_like(bias, 0.5)
    if case.loss.logits == "confident" and size > 1:
        weight = weight / weight.norm(dim=1, keepdim=True)
        hidden = 25 * weight[safe[:, 0]] + 0.1 * hidden
    if case.loss.logits == "unsure":
        weight *= 0.01
    if bias is not None:
        bias += max(min(case.loss.offset, 1000.0), -1000.0)
        if case.loss.logits == "masked":
            masked = torch.rand(vocab_size) < 0.5
            masked[safe.flatten()] = False
            bias[masked] = float("-inf")
    if num_rows and case.loss.logits in ("nan", "plus infinity"):
        capped = "softcap" in case.loss.options[1]  # a cap makes infinities finite
        hidden[case.loss.seed % num_rows, 0] = float("nan" if case.loss.logits == "nan" or capped else "inf")
    return hidden, weight, bias


def check_linear(case, device):
    """Check `linear_patch_cross_entropy` on a case; its logits are products, whose rounding eager has as well."""
    loss_case = case.loss
    compare = functools.partial(fuzz_compare.compare, rows_differ=loss_case.rows_differ())
    torch.manual_seed(loss_case.seed)
    vocab_size, group_size = loss_case.sizes
    dtype = loss_case.dtype
    groups = make_ids(loss_case.targets, (*loss_case.leading, group_size), vocab_size, loss_case.ignore_index)
    targets = groups.reshape(-1, group_size)
    hidden, weight, bias = make_layer(case, targets)
    per_target = loss_case.options[0] == "none"
    upstream = make_upstream(loss_case.upstream, groups.shape if per_target else ()).to(device)
    options = make_options(loss_case, group_size, vocab_size)
    options = {name: value.to(device) if torch.is_tensor(value) else value for name, value in options.items()}
    hidden = laid_out(hidden.view(*loss_case.leading, case.hidden_size).to(dtype).to(device), loss_case.layouts[0])
    if TORCH_2_8 and dtype in (torch.float16, torch.bfloat16):  # see test_single_16_bit_rows_with_strides
        hypothesis.assume(hidden.is_cuda or hidden.reshape(-1, case.hidden_size).stride(1) == 1)
    inputs = [hidden, laid_out(weight.to(dtype).to(device), case.weight_layout)]
    inputs.append(None if bias is None else laid_out(bias.to(dtype).to(device), case.weight_layout))
    groups, targets = groups.to(device), targets.to(device)
    kept = [None if tensor is None else tensor.clone() for tensor in inputs]

    rows = kept[0].reshape(-1, case.hidden_size)
    broken = ~rows.isfinite().all(1)
    clean = [rows.masked_fill(broken.unsqueeze(1), 0).view(kept[0].shape), *kept[1:]]
    wide = torch.promote_types(dtype, torch.float32)
    call = groups, upstream
    upcast = [None if tensor is None else tensor.to(wide) for tensor in clean]
    exact = [None if tensor is None else tensor.double() for tensor in clean]
    flat, clean_weight = (t.double() for t in (clean[0].reshape(-1, case.hidden_size), clean[1]))
    logits = torch.nn.functional.linear(flat, clean_weight, exact[2])
    row_upstream = upstream if upstream.ndim == 0 else upstream.reshape(targets.shape)
    _, whole_term, terms, due = terms_of(logits, targets, options, row_upstream, exactly=dtype == torch.float64)
    if dtype == torch.float16 and terms.numel():
        # The logits' gradient is in float16, as without the fusion; what leaves its range is not compared.
        largest = torch.stack([flat.abs().amax(), clean_weight.abs().sum(0).amax(), flat.new_ones(())]).amax()
        hypothesis.assume(terms.sum() * largest < 3e4)
    eager = run_linear(_Rounded(dtype), upcast, case.wanted, call, options)
    oracle = run_linear(reference.linear_patch_cross_entropy, exact, case.wanted, call, options)
    # A scalar upstream meets gradients that were made, and rounded, for 1; in float16 it comes first.
    unit = eager[1]
    if not per_target and dtype != torch.float16:
        unit = run_linear(_Rounded(dtype), upcast, case.wanted, (groups, torch.ones_like(upstream)), options)[1]
        unit = [None if grad is None else grad.to(dtype) * upstream.to(wide) for grad in unit]

    ours = options | {"chunk_rows": case.chunk_rows, "return_stats": True}
    ids = laid_out(
        groups.int() if loss_case.small_ids else groups,
        "stepped" if loss_case.layouts[1] == "stepped" else "contiguous",
    )
    loss, grads, stats = run_linear(npp_kernels.linear_patch_cross_entropy, inputs, case.wanted, (ids, upstream), ours)
    for now, before in zip(inputs, kept, strict=True):
        assert now is None or torch.equal(now.nan_to_num(7), before.nan_to_num(7)), "an input has changed"

    finite = logits.masked_fill(logits.isinf(), 0).abs()
    # How far an honest logit may be off, in roundings of fp32: its terms, its own rounding, one of its gradient's.
    off = flat.abs() @ clean_weight.abs().t() + (0 if exact[2] is None else exact[2].nan_to_num(0, 0, 0).abs())
    off = off.amax() if off.numel() else off.new_zeros(())
    steps = 1 + off
    if dtype in (torch.float16, torch.bfloat16):
        largest = finite.amax() if finite.numel() else finite.new_zeros(())
        steps = steps + rounded_scale(torch.maximum(largest, torch.ones_like(largest)), dtype)
    # A logit that is off shifts a softmax that is sure relatively; where it is not sure, by its row's weight.
    terms = terms * steps
    scales = [
        (terms @ clean_weight.abs().sum(0, keepdim=True)),
        (terms * flat.abs()).sum(0, keepdim=True),
        terms.sum(),
    ]
    whole = ~broken
    places = [whole, slice(None), slice(None)]
    for name, grad, plainly, true, scale, place in zip(
        ("grad_hidden", "grad_weight", "grad_bias"), grads, unit, oracle[1], scales, places, strict=True
    ):
        if grad is None:
            continue
        values = [grad, plainly.to(dtype), true]
        if name == "grad_hidden":
            values = [value.reshape(-1, case.hidden_size)[place] for value in values]
            scale = scale[place]
        elif broken.any():
            continue
        compare(*values, what=name, scale=scale)
    if grads[0] is not None:
        assert grads[0].reshape(-1, case.hidden_size)[broken & (due > 0)].isnan().all()
    if broken.any():
        if loss.ndim:
            counted = targets != options["ignore_index"]
            found = loss.reshape(targets.shape)
            assert found[broken][counted[broken]].isnan().all()
            assert not found[whole].isnan().any()
        elif (broken & (due > 0)).any():
            assert loss.isnan()
        return
    shift = steps if not per_target else steps * max(1.0, options.get("softcap") or 1.0)
    weight_of_all = 1.0 if per_target else total_weight(targets, options, logits)
    compare(loss, eager[0], oracle[0], what="loss", scale=whole_term + weight_of_all * shift)
    size = finite.amax(1) + steps if finite.numel() else steps
    for name in ("lse", "entropy"):
        values = [getattr(found, name).reshape(-1) for found in (stats, eager[2], oracle[2])]
        compare(values[0].float(), values[1].float(), values[2], what=name, scale=size * (1 if name == "lse" else 2))
    assert ((stats.prediction >= 0) & (stats.prediction < vocab_size)).all()


def total_weight(targets, options, logits):
    """Return by how much the loss moves at most when every logit moves by 1."""
    weights = torch.ones(targets.shape, dtype=torch.float64, device=targets.device)
    counted = targets != options["ignore_index"]
    weights = weights * counted
    if options.get("slot_weights") is not None:
        weights = weights * torch.as_tensor(options["slot_weights"], dtype=torch.float64, device=targets.device)
    by_id = options.get("class_weight")
    class_weights = torch.ones_like(weights)
    if by_id is not None:
        class_weights = by_id.double()[targets.masked_fill(~counted, 0)]
    if options.get("reduction", "mean") == "mean":
        weights = reference.coefficients(
            weights, class_weights, counted, options["normalize"], options.get("num_targets")
        )
    size = logits.masked_fill(logits.isinf(), 0).abs().amax() + 6 if logits.numel() else 0.0
    largest = 1.0 if by_id is None else max(by_id.max().item(), 1.0)
    rows = 1 if options.get("reduction") != "sum" else counted.any(1).sum()
    return 2 * weights.sum() * largest + 2 * options.get("z_loss", 0.0) * size * rows
