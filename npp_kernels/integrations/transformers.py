"""Hugging Face causal language models: training on patches of K consecutive tokens, by a change of the model alone.

    patched = apply(model, patch=4)
    loss = model(**batch).loss        # the call stays as it is, and so does every trainer
    patched.patch = 1                 # the next phase
    patched.undo()                    # the model as it was

Each patch enters as the mean of its tokens' embeddings and predicts the K tokens of the next. `PatchTrainerMixin` and
`PatchCollator` (`npp_kernels.integrations.transformers_trainer`) are the same for `Trainer` and TRL's `SFTTrainer`.
PatchTrain (arXiv 2407.12665) and Token-Superposition Training average over the slots of a patch, which is
``normalize="slot"``, the latter with ``slot_weights`` where later tokens count less.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType, TracebackType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npp_kernels._recorder import runs_step
from npp_kernels.embeddings.group_mean import group_mean
from npp_kernels.embeddings.patch_mean import patch_mean
from npp_kernels.grouping import group_tokens
from npp_kernels.integrations._layers import embedding_difference
from npp_kernels.integrations._transformers_batch import REFUSED as OWN_INPUTS
from npp_kernels.integrations._transformers_batch import (
    can_look,
    check_shapes,
    divisor,
    find_faults,
    fold,
    loss_options,
    raise_fault,
    shifted_groups,
)
from npp_kernels.integrations._transformers_examine import (
    Formulation,
    UnsupportedModelError,
    examine,
    has_options,
    parameter_names,
)
from npp_kernels.losses.linear_patch_cross_entropy import linear_patch_cross_entropy
from npp_kernels.losses.patch_cross_entropy import patch_cross_entropy

__all__ = ["Formulation", "Patched", "UnsupportedModelError", "apply"]

ATTRIBUTE = "_npp_patched"  # of the model; its forward finds the state there
NORMALIZATIONS = ("target", "row", "slot")


def apply(
    model: Any,
    patch: int | tuple[int, ...] = 1,
    *,
    normalize: str = "target",
    slot_weights: Sequence[float] | Tensor | None = None,
) -> Patched:
    """Change a causal language model from transformers so that its loss is on patches; return the handle of the change.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM  # doctest: +SKIP
    >>> config = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    ...                      num_attention_heads=4)  # doctest: +SKIP
    >>> model = LlamaForCausalLM(config)  # doctest: +SKIP
    >>> ids = torch.randint(512, (2, 32))
    >>> with apply(model, patch=4):  # doctest: +SKIP
    ...     model(input_ids=ids, labels=ids).loss.backward()

    The model's own forward runs, with ``inputs_embeds`` in place of ``input_ids``, and mask and positions by patches:
    its hooks, and wrappers such as autocast, `torch.compile` and DDP, which call ``model(...)``, are kept. Without
    ``labels`` nothing is changed, so `generate` is the model's own.

    Args:
        model: a causal language model, or a PEFT model around one; on the device where it runs. With PEFT, FSDP or
            DeepSpeed: after the adapters are in, before the model is wrapped.
        patch: K, tokens of a patch; ``(K,)`` is the same.
        normalize: as for `npp_kernels.patch_cross_entropy`.
        slot_weights: likewise.

    Returns:
        The handle: ``patched.patch`` may be set between steps, ``patched.formulation`` says whether the loss applies
        the head itself (``fused``) or takes the model's logits, and why; ``patched.undo()`` takes the change back, as
        does the end of a ``with``.

    Raises:
        UnsupportedModelError: a ValueError: an encoder-decoder, a model that sees later tokens, or one whose own loss
            the patched forward does not give with patches of one token.
        TypeError, ValueError: an argument of another type or value; a model that is patched already.

    Numerics:
        With K = 1 loss and gradients are the model's own within rounding. That is looked at here, by a few forwards of
        two short sequences: logits and loss are compared, and whatever follows the head (a scale, a soft cap) is either
        shown to be kept or left to the model, whose logits the loss then takes.

    Memory:
        Where fused, that of `npp_kernels.linear_patch_cross_entropy`, and the output's ``logits`` are None.
    """
    return Patched(model, patch, normalize=normalize, slot_weights=slot_weights)


class Patched:
    """The handle of a patched model: its patch, a pause, and the way back. `apply` makes it, of the same arguments.

    While it is in place, the model's forward with ``labels`` also takes ``num_targets``: the sum of `count` over all
    micro-batches and ranks of a step, the divisor that makes their losses add up to that of one big batch.
    """

    def __init__(
        self,
        model: Any,
        patch: int | tuple[int, ...],
        *,
        normalize: str = "target",
        slot_weights: Sequence[float] | Tensor | None = None,
    ) -> None:
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        is_language_model = isinstance(base, nn.Module) and hasattr(base, "get_output_embeddings")
        if not is_language_model:
            raise TypeError(f"model: expected a language model from transformers, got {type(base).__name__}")
        if hasattr(base, ATTRIBUTE):
            raise ValueError(
                "model: expected one that is not patched, got one whose forward is patched, or was wrapped since by a "
                "trainer; set patch of that handle instead, or call its undo() before the wrapper is made"
            )
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize: expected one of {NORMALIZATIONS}, got {normalize!r}")
        self.model: Any = base
        self.normalize = normalize
        device = next(base.parameters()).device
        self.slot_weights = None if slot_weights is None else torch.as_tensor(slot_weights).float().to(device)
        self.original = base.forward
        self.own_loss: Any = base.loss_function
        self.names = parameter_names(self.original)
        takes_cache = "use_cache" in self.names or (has_options(self.original) and hasattr(base.config, "use_cache"))
        self.no_cache = {"use_cache": False} if takes_cache else {}
        self._patch = self._checked(patch)
        self._paused = False
        self._call: Formulation | None = None  # of the call in progress
        self._call_divisor: Tensor | float | None = None
        self._hidden: Tensor | None = None
        self._head: nn.Module | None = None
        self._forward: Any = None
        self._previous = {name: vars(base).get(name) for name in ("forward", "_loss_function")}

        self.model.loss_function = self._loss
        try:
            self.formulation = examine(self)
        except BaseException:
            self._put_back()
            raise
        setattr(base, ATTRIBUTE, self)
        self._forward = MethodType(_with_signature(self.original), base)
        base.forward = self._forward

    @property
    def patch(self) -> int:
        """K; set it between steps, not within an accumulation of gradients."""
        return self._patch

    @patch.setter
    def patch(self, patch: int | tuple[int, ...]) -> None:
        size = self._checked(patch)
        if size == self._patch:
            return
        held = (parameter.grad for parameter in self.model.parameters())
        if any(grad is not None and bool(grad.count_nonzero()) for grad in held):
            raise ValueError(
                f"patch: expected to change between steps, from {self._patch} to {size} where no gradients are held; "
                "losses of two patches do not add up. Call zero_grad() first"
            )
        self._patch = size

    def _checked(self, patch: int | tuple[int, ...]) -> int:
        size = patch[0] if isinstance(patch, tuple) and len(patch) == 1 else patch
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"patch: expected an int or a tuple of one, since text has one axis, got {patch!r}")
        if size < 1:
            raise ValueError(f"patch: expected at least 1, got {patch!r}")
        if self.slot_weights is not None and size > 1 and len(self.slot_weights) != size:
            raise ValueError(f"slot_weights: expected one for each token of patch={size}, got {len(self.slot_weights)}")
        return size

    def undo(self) -> None:
        """Give the model its own forward back; wrappers that hold the patched one call the model's own through it."""
        if vars(self.model).get(ATTRIBUTE) is self:
            self._paused = True
            self._put_back()

    def _put_back(self) -> None:
        self.release_head()
        self._restore("_loss_function")
        if self._forward is not None and vars(self.model).get("forward") == self._forward:
            self._restore("forward")
            delattr(self.model, ATTRIBUTE)

    def _restore(self, name: str) -> None:
        if self._previous[name] is None:
            vars(self.model).pop(name, None)
        else:
            vars(self.model)[name] = self._previous[name]

    def __enter__(self) -> Patched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the model be its own for a while: its loss on single tokens, and its logits, for an evaluation."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @property
    def is_paused(self) -> bool:
        """Whether the model is its own for now."""
        return self._paused

    def count(self, **inputs: Any) -> Tensor:
        """Return what a batch adds to ``num_targets``: its scored targets, weighted, or their rows, or each slot's."""
        return divisor(shifted_groups(inputs, self._patch), self.normalize, self._weights(self._patch))

    def check(self, **inputs: Any) -> None:
        """Raise a ValueError if the batch cannot be folded to patches; waits for the GPU.

        The forward itself looks at values only where `npp_kernels.check_ids` lets it: on the CPU, or where it is on. On
        a GPU the loss of such a batch is NaN otherwise.
        """
        if self._patch > 1 and inputs.get("labels") is not None:
            check_shapes(inputs, self._patch)
            raise_fault(find_faults(inputs, self._patch))

    def _weights(self, patch: int) -> Tensor | None:
        return self.slot_weights if 1 < patch == self._patch else None  # at patch 1 the only slot has weight 1

    def take_head(self, head: nn.Linear) -> None:
        """Put a forward of ours into the output layer, which can return hidden states in place of logits."""
        self._head = head
        vars(head)["forward"] = self._apply_head

    def release_head(self) -> None:
        """Give the output layer its own forward back."""
        if self._head is not None and self._is_taken(self._head):
            del vars(self._head)["forward"]
        self._head = None

    def _is_taken(self, head: nn.Module) -> bool:
        return getattr(head.forward, "__self__", None) is self

    def _apply_head(self, hidden: Tensor) -> Tensor:
        head: Any = self._head
        if self._call is None or not self._call.fused:
            return F.linear(hidden, head.weight, head.bias)
        self._hidden = hidden
        return hidden

    def _head_is_plain(self) -> bool:
        head: Any = self._head
        if head is None or self.model.get_output_embeddings() is not head:
            return False
        hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
        return not any(hooks) and self._is_taken(head) and type(head.weight) in (Tensor, nn.Parameter)

    def call(self, arguments: tuple[Any, ...], inputs: dict[str, Any]) -> Any:
        """Run the model's patched forward."""
        inputs.update(zip(self.names, arguments, strict=False))
        num_targets, num_items = inputs.pop("num_targets", None), inputs.get("num_items_in_batch")
        patch = self._patch
        by_ids = inputs.get("input_ids") is not None and all(inputs.get(name) is None for name in OWN_INPUTS)
        own = patch == 1 and not by_ids
        if self._paused or inputs.get("labels") is None or own:
            if num_targets is not None:
                raise ValueError("num_targets: expected None where the model is its own, without labels or paused")
            return self.original(**inputs)
        inputs.pop("num_items_in_batch", None)
        if num_items is not None:
            if patch > 1:
                raise ValueError(
                    f"num_items_in_batch: expected None with patch={patch}, since it counts other targets than are "
                    "scored; give num_targets, the sum of patched.count(**batch), or use PatchTrainerMixin"
                )
            num_targets = num_items
        if inputs.get("return_dict") is False or not getattr(self.model.config, "return_dict", True):
            raise ValueError("return_dict: expected True or None, since the logits may be left out, got False")
        faults = []
        if patch > 1:
            check_shapes(inputs, patch)
            faults = find_faults(inputs, patch)
            if can_look(inputs["input_ids"]):
                raise_fault(faults)
                faults = []
        formulation = self.formulation
        if formulation.fused and not self._head_is_plain():
            formulation = replace(formulation, fused=False, softcap=None)
        outputs, _ = self.run_patched(inputs, patch, formulation, num_targets)
        changes: dict[str, Any] = {"logits": None} if formulation.fused else {}
        if faults:
            wrong = torch.stack([fault for fault, _ in faults]).any()
            changes["loss"] = outputs.loss * torch.where(wrong, torch.nan, 1.0)  # and with it the gradients
        return type(outputs)(**{**outputs, **changes}) if changes else outputs

    def run_own(self, inputs: dict[str, Any]) -> Any:
        """Run the model's own forward, which keeps no cache."""
        return self.original(**inputs, **self.no_cache)

    def _cache_options(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return that no cache is kept, which none needs in training, or that one is, which a graph needs.

        Without a cache transformers looks whether positions are those of packed documents, and waits for the GPU.
        """
        is_packed = any(inputs.get(name) is not None for name in ("attention_mask", "position_ids"))
        return {"use_cache": True} if self.no_cache and runs_step() and not is_packed else self.no_cache

    def run_patched(
        self, inputs: dict[str, Any], patch: int, formulation: Formulation, num_targets: Tensor | float | None = None
    ) -> tuple[Any, Tensor | None]:
        """Run the model's own forward on a batch that is folded; return its output, and what the head stood for."""
        folded = {**fold(inputs, patch), **self._cache_options(inputs)}
        folded["inputs_embeds"] = self._embed(inputs["input_ids"], patch, formulation.input_scale)
        groups = folded["labels"]
        if not formulation.inside:
            del folded["labels"]
        self._call, self._call_divisor = formulation, num_targets
        try:
            outputs = self.original(**folded)
            if not formulation.inside:
                loss = self._score(outputs.logits, groups)
                if getattr(outputs, "aux_loss", None) is not None:
                    loss = loss + self.model.config.router_aux_loss_coef * outputs.aux_loss
                outputs = type(outputs)(**{**outputs, "loss": loss})
            hidden = self._hidden if formulation.softcap is not None else outputs.logits
            return outputs, hidden
        finally:
            self._call = self._call_divisor = self._hidden = None

    def _embed(self, ids: Tensor, patch: int, scale: float) -> Tensor:
        embedding: Any = self.model.get_input_embeddings()
        if patch > 1 and embedding_difference(embedding) is None:
            means = group_mean(embedding.weight, group_tokens(ids, (patch,)))
        else:
            means = patch_mean(embedding(ids), (patch,))
        return means if scale == 1 else means * scale

    def _loss(self, logits: Tensor, labels: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """Stand in for the model's ``loss_function``; in a patched call the labels are groups, shifted already."""
        if self._call is None:
            return cast(Tensor, self.own_loss(logits, labels, *arguments, **options))
        return self._score(logits, labels)

    def _score(self, rows: Tensor, groups: Tensor) -> Tensor:
        """Return the loss of what came through the head, logits or hidden states, ``groups [B, P, K]``."""
        formulation = self._call
        assert formulation is not None
        options, share = loss_options(groups, self._call_divisor, self.normalize, self._weights(groups.shape[-1]))
        groups = groups.to(rows.device)
        if formulation.fused:
            head: Any = self._head
            hidden = rows if formulation.softcap is None else self._hidden
            assert hidden is not None
            if not torch.is_autocast_enabled(hidden.device.type):
                hidden = hidden.to(head.weight.dtype)  # some models compute logits in a wider dtype
            loss = linear_patch_cross_entropy(
                hidden, head.weight, groups, bias=head.bias, softcap=formulation.softcap, **options
            )
        else:
            loss = patch_cross_entropy(rows, groups, **options)
        assert isinstance(loss, Tensor)  # a tensor alone, since no statistics are asked for
        return loss if share is None else loss * share


def _with_signature(original: Any) -> Any:
    """Return the patched forward, a function of the model: trainers read off the signature what a model takes."""

    def forward(model: Any, *arguments: Any, **inputs: Any) -> Any:
        return getattr(model, ATTRIBUTE).call(arguments, inputs)

    signature = inspect.signature(original)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])  # type: ignore[attr-defined]
    return forward
