"""What the autograd functions share: they refuse, clearly, a second derivative and the transforms of `torch.func`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor


def refuse_transforms(name: str, *upstream: Tensor | None) -> None:
    """Raise a RuntimeError inside a transform of `torch.func`, whose tensors have no memory that a kernel could read.

    Compiled code is let through: `torch.compile` traces the transform away, or says itself why it cannot.

    Args:
        name: the public function.
        upstream: in a backward, its gradients: `torch.autograd` has a vmap of its own, which only they show.
    """
    if torch.compiler.is_compiling():
        return
    # PyTorch has no public way to ask either; `torch.autograd.Function.apply` uses the first one itself.
    inside = torch._C._are_functorch_transforms_active()
    for gradient in upstream:
        inside = inside or (gradient is not None and torch._C._functorch.is_legacy_batchedtensor(gradient))
    if inside:
        raise RuntimeError(
            f"{name}: expected plain tensors, got a call inside of a transform of torch.func (vmap, grad, jacrev, ...) "
            "or of torch.autograd with is_grads_batched=True or vectorize=True, which the kernels do not serve. In "
            "place of vmap give the tensors one more leading axis, or call the function in a loop; in place of "
            "torch.func.grad use torch.autograd.grad or .backward()"
        )


def wants_backward(tensor: Tensor) -> bool:
    """Return whether a call on the PyTorch path has to go through its autograd function.

    Without a gradient the function is 10 µs for nothing. Compiled code costs nothing, and its transforms need it.
    """
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and tensor.requires_grad)


def as_rows(tensor: Tensor) -> Tensor:
    """Return a tensor with all but its last axis flattened; one of two axes as it is.

    A view that changes nothing takes the host 1 µs, and where there is a gradient a step of the backward. Compiled code
    loses it anyway, and transforms of `torch.func` in it need what is saved to be no argument of theirs.
    """
    if tensor.ndim == 2 and not torch.compiler.is_compiling():
        return tensor
    return tensor.reshape(-1, tensor.shape[-1])


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a result of an autograd function in a dtype; itself where it has that.

    `Tensor.to` returns the same tensor then, as an operation in place does. Where a result is that of two operations,
    PyTorch 2.11 compiles the function to one whose gradient is zero.
    """
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


Backward = Callable[..., Any]  # of an autograd function


class _NoSecondOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, grad: Tensor, *sources: Tensor) -> Tensor:
        ctx.name = name
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise RuntimeError(
            f"{ctx.name}: expected one backward, got a double backward; the kernels have no second derivative. "
            "For gradient penalties and Hessians use the plain operations of torch instead"
        )


def first_order_only(name: str) -> Callable[[Backward], Backward]:
    """Decorate a backward so that its results raise a RuntimeError when they are differentiated themselves.

    It also refuses transforms of `torch.func`: a backward can be inside of one whose forward was not.

    `torch.autograd.function.once_differentiable` does so only where the upstream gradient needs a gradient, and
    otherwise returns a constant, so that ``autograd.grad(loss, x, create_graph=True)`` would be silently wrong.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def first_order(ctx: Any, *upstream: Tensor | None) -> Any:
            refuse_transforms(name, *upstream)
            compiling = torch.compiler.is_compiling()
            # Usually nobody wants to differentiate the results. Compiled code may trace this with gradients off and
            # run it with them on, so that it always turns them off here.
            if not compiling and not torch.is_grad_enabled():
                return backward(ctx, *upstream)
            with torch.no_grad():
                grads = backward(ctx, *upstream)
            if compiling:
                return grads
            sources = [
                tensor
                for tensor in (*upstream, *ctx.saved_tensors)
                if isinstance(tensor, Tensor) and tensor.requires_grad
            ]
            return tuple(None if grad is None else _NoSecondOrder.apply(name, grad, *sources) for grad in grads)

        return first_order

    return decorate
