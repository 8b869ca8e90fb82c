"""Hugging Face causal language models: a training phase on patches of K consecutive tokens.

    loss = patch_loss(model, batch["input_ids"], 4, labels=batch["labels"])    # instead of model(**batch).loss

PatchTrain (arXiv 2407.12665) and Token-Superposition Training average over the places of a patch, which is
``normalize="slot"``, the latter with ``slot_weights`` where later tokens count less. Both end with a phase on single
tokens, K = 1, whose loss is the model's own.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from npp_kernels.group_mean import group_mean
from npp_kernels.grouping import Patch, group_tokens
from npp_kernels.linear_patch_cross_entropy import linear_patch_cross_entropy

LOGIT_SCALES = ("logit_scale", "logits_scaling")  # of Cohere's models, of Granite


def patch_loss(model: Any, input_ids: Tensor, patch: Patch, *, labels: Tensor | None = None, **options) -> Any:
    """Return the loss of every patch's tokens, predicted from the patches before it.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> embedding, head = torch.nn.Embedding(512, 64), torch.nn.Linear(64, 512)
    >>> model = SimpleNamespace(  # stands in for a model from transformers
    ...     config=None, get_input_embeddings=lambda: embedding, get_output_embeddings=lambda: head,
    ...     base_model=lambda inputs_embeds, use_cache: SimpleNamespace(last_hidden_state=inputs_embeds))
    >>> patch_loss(model, torch.randint(512, (2, 32)), 4, normalize="slot").shape
    torch.Size([])

    Patches enter as the means of their embeddings, through ``inputs_embeds``; the logits never exist. The model's own
    attention is causal over patches, and its positions count patches.

    Args:
        model: a causal language model with ``get_input_embeddings()``, ``get_output_embeddings()`` and ``base_model``
            (the model without its head).
        input_ids: ``[B, L]``, int32 or int64; L is a multiple of ``patch`` of at least twice its size. Padding is on
            the right.
        patch: K, tokens of a patch, as an int or ``(K,)``.
        labels: ``[B, L]``, ``input_ids`` where they count and -100 where not, unshifted as for the model itself;
            ``input_ids`` where None.
        options: those of `npp_kernels.linear_patch_cross_entropy`, such as ``normalize``, ``slot_weights`` and
            ``num_targets``.

    Returns:
        What `npp_kernels.linear_patch_cross_entropy` returns.

    Raises:
        TypeError: embeddings or head are not a plain `torch.nn.Embedding` and `torch.nn.Linear`: what else they do
            would be lost.
        ValueError: the model scales its logits; or a shape does not fit.

    Numerics:
        A final soft cap, ``config.final_logit_softcapping``, is applied.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for name, module, expected in (("input", embedding, nn.Embedding), ("output", head, nn.Linear)):
        if type(module) is not expected:
            raise TypeError(
                f"model: expected {name} embeddings of type torch.nn.{expected.__name__}, got {type(module).__name__}"
            )
    for name in LOGIT_SCALES:
        scale = getattr(model.config, name, None)
        if scale not in (None, 1):
            raise ValueError(f"model: expected logits that are not scaled, got config.{name}={scale}")
    length = input_ids.shape[-1:]  # the grid of a text: a patch of a schedule may be an int or a tuple
    groups = group_tokens(input_ids, patch, grid=length)
    targets = groups if labels is None else group_tokens(labels, patch, grid=length)
    inputs = group_mean(cast(Tensor, embedding.weight), groups[:, :-1])
    hidden = model.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    options = {"softcap": getattr(model.config, "final_logit_softcapping", None), **options}
    return linear_patch_cross_entropy(hidden, head.weight, targets[:, 1:], bias=head.bias, **options)
