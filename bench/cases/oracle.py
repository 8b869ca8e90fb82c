"""Who may be timed: each contender's output and gradients against the reference in fp64, first.

The bounds are wide enough for any sound way to round, and far too narrow for a wrong one; the tests hold npp_kernels to
a far tighter budget. Two errors are looked at. The mean one, Σ|x − o| / Σ|o|, sees the many small entries: a gradient
of logits without its softmax part is off by half, where the usual root mean square sees next to nothing. The worst one,
max|x − o| / max|o|, sees a single entry gone wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases.inputs import Inputs
from bench.cases.shapes import LOSSES, Workload
from reference import ops

# bf16 and fp16: four units in the last place of bf16, since peers that accumulate a weight's gradient in bf16 are a few
# roundings off and still train models. fp32: what a matrix product with another order of summation may do, with room.
TOLERANCES = {torch.bfloat16: 2.0**-5, torch.float16: 2.0**-5, torch.float32: 2.0**-13}

# Rows of logits whose gradient is compared: all of them up to this many elements, else as many rows, evenly spread.
MAX_COMPARED_ELEMENTS = 2**25
# Elements of logits that the fp64 reference holds at a time.
MAX_CHUNK_ELEMENTS = 2**25


class RejectedError(Exception):
    """A contender whose result is not the reference's."""


@dataclass(frozen=True)
class Expected:
    """What the reference says, in fp64."""

    output: Tensor
    gradients: tuple[Tensor, ...]
    rows: Tensor | None = None  # which rows of the first leaf ``gradients[0]`` holds; None for all


def _row_chunks(workload: Workload, rows: Tensor) -> Sequence[Tensor]:
    """Split row indices so that the logits of one chunk fit into the reference's share of memory."""
    return rows.split(max(MAX_CHUNK_ELEMENTS // workload.vocab_size, 1))


def _loss_of_rows(workload: Workload, leaves: Sequence[Tensor], inputs: Inputs, chunk: Tensor) -> Tensor:
    """Return the reference's losses of some rows, ``[rows, K]``, as they count in the whole."""
    loss: Callable[..., tuple[Tensor, ops.PatchLossStats]] = getattr(ops, workload.operation)
    losses, _ = loss(*leaves, inputs.groups[chunk], reduction="none")
    return losses if workload.reduction == "none" else losses / inputs.groups.numel()


def _loss_gradients(
    workload: Workload, inputs: Inputs, chunks: Sequence[Tensor], others: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Yield the gradients of the first leaf, chunk by chunk; add those of the other leaves up in their ``grad``."""
    for chunk in chunks:
        rows = inputs.leaves[0].detach()[chunk].double().requires_grad_()
        losses = _loss_of_rows(workload, (rows, *others), inputs, chunk)
        upstream = torch.ones_like(losses) if inputs.upstream is None else inputs.upstream[chunk].double()
        gradients = torch.autograd.grad(losses, (rows, *others), upstream)
        for other, gradient in zip(others, gradients[1:], strict=True):
            other.grad = gradient if other.grad is None else other.grad.add_(gradient)
        yield gradients[0]


def _expected_loss(workload: Workload, inputs: Inputs) -> Expected:
    """Score all rows; differentiate all of them where there is a weight, else as many as are compared."""
    first, *others = (leaf.detach() for leaf in inputs.leaves)
    others = [other.double().requires_grad_() for other in others]
    every_row = torch.arange(workload.rows, device=first.device)
    compared = every_row
    if not others and workload.rows * workload.vocab_size > MAX_COMPARED_ELEMENTS:
        count = max(MAX_COMPARED_ELEMENTS // workload.vocab_size, 1)
        compared = torch.linspace(0, workload.rows - 1, count, device=first.device).long()
    with torch.no_grad():
        output = torch.cat(
            [
                _loss_of_rows(workload, (first[chunk].double(), *others), inputs, chunk)
                for chunk in _row_chunks(workload, every_row)
            ]
        )
    gradient = torch.cat([*_loss_gradients(workload, inputs, _row_chunks(workload, compared), others)])
    return Expected(
        output if workload.reduction == "none" else output.sum(),
        (gradient, *(other.grad for other in others if other.grad is not None)),
        None if compared is every_row else compared,
    )


def expected(workload: Workload, inputs: Inputs) -> Expected:
    """Compute a workload with the reference, in fp64."""
    if workload.operation in LOSSES or inputs.upstream is None:
        return _expected_loss(workload, inputs)
    leaf = inputs.leaves[0].detach().double().requires_grad_()
    if workload.operation == "group_mean":
        output = ops.group_mean(leaf, inputs.groups)
    else:
        output = ops.patch_mean(leaf, (workload.patch, workload.patch))
    return Expected(output.detach(), torch.autograd.grad(output, (leaf,), inputs.upstream.double()))


def errors(actual: Tensor, oracle: Tensor) -> tuple[float, float]:
    """Return the mean and the worst error of a result, relative to the oracle's mean and greatest magnitude."""
    difference = (actual.double() - oracle).abs()
    mean = difference.sum() / oracle.abs().sum()
    worst = difference.max() / oracle.abs().max()
    return mean.item(), worst.item()


def check(name: str, actual: Tensor, oracle: Tensor, dtype: torch.dtype) -> float:
    """Return the mean error of a result; raise a RejectedError where it is not the oracle's within the tolerance."""
    if actual.shape != oracle.shape:
        raise RejectedError(f"{name}: expected shape {tuple(oracle.shape)}, got {tuple(actual.shape)}")
    mean, worst = errors(actual, oracle)
    tolerance = TOLERANCES[dtype]
    if not (mean <= tolerance and worst <= tolerance):  # so put that NaN is rejected
        raise RejectedError(
            f"{name}: mean error {mean:.2g}, worst {worst:.2g}, more than {tolerance:.2g} of the oracle"
        )
    return mean


def check_result(result: tuple[Tensor, Sequence[Tensor]], oracle: Expected, dtype: torch.dtype) -> float:
    """Check an output and its gradients, if any came; return the greatest of their mean errors."""
    output, gradients = result
    found = [check("output", output.detach(), oracle.output, dtype)]
    if gradients:
        for index, (actual, wanted) in enumerate(zip(gradients, oracle.gradients, strict=True)):
            rows = oracle.rows if index == 0 else None
            found.append(check(f"gradient {index}", actual if rows is None else actual[rows], wanted, dtype))
    return max(found)
