"""Whether a model's embedding or output layer is what `group_mean` and `linear_patch_cross_entropy` compute.

Both take a weight in place of a layer. Whatever else the layer does (an adapter, a hook, a scale, a norm that is kept)
would be lost without a word, so an integration asks here before it reads a weight.

A parametrised weight is no difference: ``module.weight`` is what the layer itself reads, and gradients flow through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from npp_kernels.vocabulary_shard import is_dtensor

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Options of torch.nn.Embedding that change its forward or gradient, with the values at which they do nothing.
_EMBEDDING_OPTIONS = {"max_norm": None, "padding_idx": None, "scale_grad_by_freq": False, "sparse": False}


def plain_embedding(module: nn.Module) -> Tensor:
    """Return the weight ``[V, D]`` of a layer that is a look-up in it, and nothing else.

    >>> import torch
    >>> plain_embedding(torch.nn.Embedding(512, 64)).shape
    torch.Size([512, 64])

    Raises:
        TypeError: the layer does anything else; the message names it.
    """
    if difference := embedding_difference(module):
        raise TypeError(f"embedding: expected a plain torch.nn.Embedding, got {difference}")
    weight: Tensor = module.weight  # type: ignore[assignment]  # of an nn.Embedding
    return weight


def plain_linear(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return the weight ``[V, D]`` and the bias of a layer that is ``x · Wᵀ + b``, and nothing else.

    >>> import torch
    >>> weight, bias = plain_linear(torch.nn.Linear(64, 512, bias=False))
    >>> weight.shape, bias
    (torch.Size([512, 64]), None)

    Raises:
        TypeError: the layer does anything else; the message names it.
    """
    if difference := linear_difference(module):
        raise TypeError(f"output: expected a plain torch.nn.Linear, got {difference}")
    weight: Tensor = module.weight  # type: ignore[assignment]  # of an nn.Linear
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    return weight, bias


def embedding_difference(module: nn.Module) -> str | None:
    """Return what a layer has beyond a plain `torch.nn.Embedding`, in words; None where there is nothing.

    >>> import torch
    >>> embedding_difference(torch.nn.Embedding(512, 64, padding_idx=0))
    'an Embedding with padding_idx=0'
    """
    if difference := _difference(module, nn.Embedding):
        return difference
    for name, neutral in _EMBEDDING_OPTIONS.items():
        value = getattr(module, name)
        if value != neutral:
            return f"an {type(module).__name__} with {name}={value}"
    return None


def linear_difference(module: nn.Module, *, only_shards: Callable[[Any], bool] | None = None) -> str | None:
    """Return what a layer has beyond a plain `torch.nn.Linear`, in words; None where there is nothing.

    >>> import torch
    >>> linear_difference(torch.nn.Sequential(torch.nn.Linear(64, 512)))
    'a torch.nn.modules.container.Sequential'

    Args:
        module: the layer.
        only_shards: says of a hook, or of a forward of the instance, that it gathers and scatters what the layer has
            and changes nothing of it. With it the weight may be a `DTensor`, which it is outside of such hooks.
    """
    return _difference(module, nn.Linear, only_shards)


def _difference(
    module: nn.Module, expected: type[nn.Module], only_shards: Callable[[Any], bool] | None = None
) -> str | None:
    kind = type(module)
    name = f"{kind.__module__}.{kind.__qualname__}"  # an adapter's class may have the same short name
    if not isinstance(module, expected):
        return f"a {name}"
    harmless = only_shards or (lambda function: False)
    # Offloading and adapters replace the forward of an instance.
    replaced = "forward" in module.__dict__ and not harmless(module.__dict__["forward"])  # torch 2.8 traces no `vars`
    if kind.forward is not expected.forward or kind.__call__ is not nn.Module.__call__ or replaced:
        return f"a {name} with a forward of its own"
    if hooks := [hook.removeprefix("_") for hook in _HOOKS if not all(map(harmless, getattr(module, hook).values()))]:
        return f"a {name} with {', '.join(hooks)}"
    if type(module.weight) not in (Tensor, nn.Parameter) and not (only_shards and is_dtensor(module.weight)):
        return f"a {name} whose weight is a {type(module.weight).__name__}"
    return None
