"""The products around a loss on hidden states, in chunks of rows whose logits exist one after the other.

A chunk of logits is made, scored, overwritten by its gradient, and used up by the two gradient products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from npp_kernels._dispatch import cdiv, runs_kernels
from npp_kernels.losses.exponential_rows import scale_rows
from npp_kernels.losses.exponentials import find_offsets, launch_exponentials, serves_exponentials
from npp_kernels.losses.gradient_kernels import launch_gradient
from npp_kernels.losses.row_kernels import launch_loss
from npp_kernels.losses.row_layout import ALIGNMENT, empty_rows
from npp_kernels.losses.scores import Scores
from npp_kernels.losses.sharded import score_over_ranks
from npp_kernels.losses.targets import Targets
from npp_kernels.losses.torch_path import torch_gradient, torch_loss
from npp_kernels.vocabulary_shard import VocabularyShard

# Adding a chunk to the fp32 gradient of the weight reads and writes 8·V·D bytes, against 6·rows·V·D operations: at an
# H100's rates 311/rows of the products' time, whatever V and D. 4,096 rows lose 8%, 512 rows 60% (H100, 2026-11-24:
# 31 ms for V = 128,256, D = 2048, 8,192 rows in chunks of 512 rows; 21 in chunks of 2,048; 20 in chunks of 4,096).
CHUNK_ROWS = 4096
CHUNK_ELEMENTS = 1 << 29  # and no more than a gigabyte of 16-bit logits, where the vocabulary is wide
CHUNK_MULTIPLE = 128

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of the hidden states, the weight and the bias; None for those that nobody wants."""


class Layer(NamedTuple):
    """The output layer and its input, as the caller gave them."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]


class Plan(NamedTuple):
    """How the products are made, and which gradients of a `Layer` are wanted."""

    dtype: torch.dtype
    chunk_rows: int | None
    wants: tuple[bool, bool, bool]

    def wanting(self, hidden: bool, weight: bool, bias: bool) -> Plan:
        """Return the same for other gradients; torch.compile of torch 2.8 does not trace `_replace`."""
        return Plan(self.dtype, self.chunk_rows, (hidden, weight, bias))


def find_chunks(num_rows: int, vocab_size: int, chunk_rows: int | None, spare_rows: int) -> Iterator[slice]:
    """Yield the rows of each chunk: equal sizes, multiples of a product's tile where there is room.

    Several chunks need a buffer as large as ``spare_rows`` of logits; as many rows more in a single one cost no more.
    """
    if num_rows == 0:
        return
    limit = chunk_rows
    if limit is None:
        limit = min(CHUNK_ROWS, max(CHUNK_ELEMENTS // vocab_size, CHUNK_MULTIPLE))
        if num_rows <= limit + spare_rows:
            limit = num_rows
    step = cdiv(num_rows, cdiv(num_rows, limit))
    if step + CHUNK_MULTIPLE <= limit:
        step = cdiv(step, CHUNK_MULTIPLE) * CHUNK_MULTIPLE
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))


def _rows(tensor: Tensor, chunk: slice) -> Tensor:
    """Return the rows of a chunk: the tensor itself where that is all of them, the rule for few rows.

    What `find_chunks` yields has a start and a stop; a view takes the host three times as long as finding that out.
    """
    return tensor if chunk.stop - chunk.start == tensor.shape[0] else tensor[chunk]


def _without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Return what turns autocast off, where it is on: to enter that context takes longer than to ask."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``left · right`` in ``dtype``, accumulated at least in fp32."""
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left · right`` to ``total``, in the dtype of ``total``."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


class _Products:
    """The products of one call, in their dtype: logits by chunk, and the gradients that are gathered from them."""

    def __init__(self, layer: Layer, plan: Plan, shard: VocabularyShard | None, *, spare: bool = True) -> None:
        self.given, self.wants, self.shard = layer, plan.wants, shard
        hidden, weight, bias = layer
        self.hidden = hidden.to(plan.dtype)
        self.weight = weight.to(plan.dtype)
        self.bias = None if bias is None else bias.to(plan.dtype)
        self.wide = torch.promote_types(plan.dtype, torch.float32)
        # The fp32 gradient of the weight is a buffer of its own where the weight has another dtype.
        summed_apart = spare and plan.wants[1] and weight.dtype != self.wide
        spare_rows = self.wide.itemsize * weight.shape[1] // plan.dtype.itemsize if summed_apart else 0
        # Ranks with slices of other sizes make the same chunks, for after each they talk to each other.
        num_ids = weight.shape[0] if shard is None else max(shard.sizes)
        self.chunks = list(find_chunks(hidden.shape[0], num_ids, plan.chunk_rows, spare_rows))
        self.grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if plan.wants[0] else None
        self.grad_weight: Tensor | None = None
        self.grad_bias: Tensor | None = None
        self.on_its_way: tuple[slice, Tensor, dist.Work] | None = None

    def logits(self, chunk: slice) -> Tensor:
        """Return one chunk of logits."""
        hidden, transposed = _rows(self.hidden, chunk), self.weight.t()
        # Rows that start at odd addresses halve the rate of all three products, and of the kernel between them.
        padded = runs_kernels(hidden) and self.weight.shape[0] % ALIGNMENT != 0
        out = empty_rows(hidden.shape[0], self.weight.shape[0], hidden) if padded else None
        if self.bias is None:
            return torch.mm(hidden, transposed, out=out)
        return torch.addmm(self.bias, hidden, transposed, out=out)

    def add(
        self, chunk: slice, dlogits: Tensor, row_scale: Tensor | None = None, scaled_hidden: Tensor | None = None
    ) -> None:
        """Use up one chunk of the logits' gradient, or its factors (see `ScaledGradient`).

        Args:
            chunk: which rows.
            dlogits: ``[N, V]``.
            row_scale: ``[N]``, what the rows are still to be multiplied by.
            scaled_hidden: ``[N, D]``, the hidden states, already multiplied by it.
        """
        hidden = _rows(self.hidden, chunk) if scaled_hidden is None else scaled_hidden
        if self.grad_hidden is not None:
            if self.shard is not None:
                self._start_sum(chunk, _product(dlogits, self.weight, self.wide), self.shard)
            elif row_scale is not None:
                scale_rows(_product(dlogits, self.weight, self.wide), row_scale, _rows(self.grad_hidden, chunk))
            elif self.grad_hidden.dtype == dlogits.dtype:
                torch.mm(dlogits, self.weight, out=_rows(self.grad_hidden, chunk))
            else:
                self.grad_hidden[chunk] = dlogits @ self.weight
        if self.wants[1]:
            if self.grad_weight is not None:
                _add_product(self.grad_weight, dlogits.t(), hidden)
            else:
                # A single chunk is summed inside one product, which rounds once; several need fp32 between them.
                dtype = self.given.weight.dtype if len(self.chunks) == 1 else self.wide
                self.grad_weight = _product(dlogits.t(), hidden, dtype)
        if self.wants[2]:
            total = dlogits.sum(0, dtype=self.wide)
            self.grad_bias = total if self.grad_bias is None else self.grad_bias.add_(total)

    def _start_sum(self, chunk: slice, part: Tensor, shard: VocabularyShard) -> None:
        """Begin to sum a chunk of the hidden states' gradient over the ranks, in fp32, beside the next chunk's work."""
        self._finish_sum()
        self.on_its_way = chunk, part, shard.start_all_reduce(part, "sum")

    def _finish_sum(self) -> None:
        if self.on_its_way is not None and self.grad_hidden is not None:
            chunk, total, work = self.on_its_way
            work.wait()
            self.grad_hidden[chunk] = total  # rounded here, once
            self.on_its_way = None

    def gradients(self) -> Gradients:
        """Return the gradients in the dtypes of the arguments."""
        self._finish_sum()

        def finished(want: bool, total: Tensor | None, given: Tensor | None) -> Tensor | None:
            if not want or given is None:
                return None
            return torch.zeros_like(given) if total is None else total.to(given.dtype)

        _, weight, bias = self.given
        _, wants_weight, wants_bias = self.wants
        return (
            self.grad_hidden,
            finished(wants_weight, self.grad_weight, weight),
            finished(wants_bias, self.grad_bias, bias),
        )


def _score(logits: Tensor, targets: Targets, scores: Scores, with_gradient: bool) -> None:
    """Fill the ``scores``; with the gradient, for an upstream of 1, overwrite the ``logits`` by it."""
    if targets.shard is not None:
        score_over_ranks(logits, targets, scores)
    elif runs_kernels(logits):
        launch_loss(logits, logits if with_gradient else None, targets, scores)
        return
    else:
        torch_loss(logits, targets, scores)
    if with_gradient:
        unit = torch.ones((), dtype=scores.rows.dtype, device=logits.device)
        (launch_gradient if runs_kernels(logits) else torch_gradient)(logits, logits, targets, scores, unit)


def loss_and_gradients(layer: Layer, targets: Targets, plan: Plan, scores: Scores) -> Gradients:
    """Fill the ``scores``; return the wanted gradients, for an upstream of 1."""
    with _without_autocast(layer.hidden):
        products = _Products(layer, plan, targets.shard)
        wanted = any(plan.wants)
        as_exponentials = wanted and products.bias is None and targets.shard is None
        if as_exponentials and serves_exponentials(products.hidden, products.weight, targets, scores):
            offsets = find_offsets(products.hidden, products.weight)
            for chunk in products.chunks:
                factors = launch_exponentials(
                    _rows(products.hidden, chunk),
                    products.weight,
                    _rows(offsets, chunk),
                    targets.rows(chunk),
                    scores.chunk(chunk),
                )
                products.add(chunk, *factors)
                del factors  # before the next chunk is made
        else:
            for chunk in products.chunks:
                logits = products.logits(chunk)
                _score(logits, targets.rows(chunk), scores.chunk(chunk), wanted)
                if wanted:
                    products.add(chunk, logits)
                del logits  # before the next chunk is made
        return products.gradients()


def gradients_from_scores(layer: Layer, targets: Targets, plan: Plan, scores: Scores, upstream: Tensor) -> Gradients:
    """Return the wanted gradients for an ``upstream [] or [N, K]``, from the ``scores`` of the forward."""
    with _without_autocast(layer.hidden):
        # The forward, which wanted no gradients, had no spare rows: the same chunks give the same logits.
        products = _Products(layer, plan, targets.shard, spare=False)
        upstream = upstream.contiguous()
        for chunk in products.chunks:
            logits = products.logits(chunk)
            fill = launch_gradient if runs_kernels(logits) else torch_gradient
            chunk_upstream = upstream if upstream.ndim == 0 else _rows(upstream, chunk)
            fill(logits, logits, targets.rows(chunk), scores.chunk(chunk), chunk_upstream)
            products.add(chunk, logits)
            del logits  # before the next chunk is made
        return products.gradients()
