"""What the autograd functions share: a backward that refuses, clearly, to be differentiated."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


class _NoSecondOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, grad, *sources):
        ctx.name = name
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{ctx.name}: expected one backward, got a double backward; the kernels have no second derivative. "
            "For gradient penalties and Hessians use the plain operations of torch instead"
        )


def first_order_only(name: str) -> Callable:
    """Decorate a backward so that its results raise a RuntimeError when they are differentiated themselves.

    `torch.autograd.function.once_differentiable` does so only where the upstream gradient needs a gradient, and
    otherwise returns a constant, so that ``autograd.grad(loss, x, create_graph=True)`` would be silently wrong.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def first_order(ctx, *upstream):
            with torch.no_grad():
                grads = backward(ctx, *upstream)
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return grads
            sources = [
                tensor
                for tensor in (*upstream, *ctx.saved_tensors)
                if isinstance(tensor, Tensor) and tensor.requires_grad
            ]
            return tuple(None if grad is None else _NoSecondOrder.apply(name, grad, *sources) for grad in grads)

        return first_order

    return decorate
