"""LlamaGen's `Transformer` and the official NPP code's: their own training scripts, without expanded logits.

One line after the model is made, before it is compiled or wrapped::

    apply(model)                                             # from npp_kernels.integrations.llamagen
    ...
    _, loss = model(cond_idx=c, idx=z, targets=z, p=p, patch_size=p * p)     # as the official NPP script calls it
    _, loss = model(cond_idx=c, idx=z[:, :-1], targets=z)                    # as LlamaGen's script does

Parameters, checkpoints and sampling stay as they are. In a forward of one's own, `patch_inputs` and `patch_loss` are
the two lines that a patch changes; the rotary table is then that of the coarse grid, `coarse_rotary_table`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npp_kernels.embeddings.group_mean import group_mean
from npp_kernels.embeddings.patch_mean import patch_mean
from npp_kernels.grouping import group_tokens
from npp_kernels.integrations._layers import embedding_difference, linear_difference, plain_embedding, plain_linear
from npp_kernels.losses.linear_patch_cross_entropy import linear_patch_cross_entropy
from npp_kernels.losses.patch_cross_entropy import patch_cross_entropy
from npp_kernels.schedule import PatchSchedule

_SURFACE = (
    "block_size", "cls_embedding", "cls_token_num", "freqs_cis", "layers", "norm", "output", "tok_dropout",
    "tok_embeddings",
)  # fmt: skip


def patch_inputs(embedding: nn.Module, groups: Tensor) -> Tensor:
    """Return what follows the condition tokens at the transformer's entry: ``groups [B, P, K] -> [B, P - 1, D]``.

    >>> import torch
    >>> from npp_kernels import group_tokens
    >>> groups = group_tokens(torch.randint(512, (2, 256)), 4, grid=(16, 16))
    >>> patch_inputs(torch.nn.Embedding(512, 64), groups).shape
    torch.Size([2, 15, 64])

    The last group is left out: nothing comes after it.

    Args:
        embedding: ``tok_embeddings`` of the model, a plain `torch.nn.Embedding`. Of one that does more, average what it
            returns: ``patch_mean(embedding(tokens), patch, grid=grid)[:, :-1]``.
        groups: ids of a step, int32 or int64.

    Raises:
        TypeError: the embedding does more than look rows up (a scale, hooks, ``padding_idx`` and so on).
        TypeError, ValueError, IndexError: those of `npp_kernels.group_mean`.
    """
    return group_mean(plain_embedding(embedding), groups[:, :-1])


def patch_loss(hidden: Tensor, output: nn.Module, groups: Tensor, *, num_targets: int | Tensor | None = None) -> Tensor:
    """Return the mean cross entropy of all tokens: ``hidden [B, P, D], groups [B, P, K] ->`` a number.

    >>> import torch
    >>> from npp_kernels import group_tokens
    >>> groups = group_tokens(torch.randint(512, (2, 256)), 4, grid=(16, 16))
    >>> output = torch.nn.Linear(64, 512, bias=False)
    >>> patch_loss(torch.randn(2, 16, 64), output, groups).shape
    torch.Size([])

    Row p has seen the condition and the groups before p, so there is no shift. With more than one condition token the
    rows begin at the last of them: ``hidden = h[:, cls_token_num - 1:]``.

    Args:
        hidden: the model's last hidden states, after its norm.
        output: the model's output layer, not applied yet.
        groups: the ids that `patch_inputs` got.
        num_targets: the targets of the whole step, where a step is many batches.

    Raises:
        TypeError, ValueError, IndexError: those of `npp_kernels.linear_patch_cross_entropy`.

    Memory:
        No logits. Of a layer that does more than a `torch.nn.Linear` (an adapter, hooks), the logits that it returns,
        once for each patch.
    """
    return cast(Tensor, _loss(hidden, output, groups, num_targets=num_targets))  # alone: no statistics are asked for


def coarse_rotary_table(model: nn.Module, patch: int) -> Tensor:
    """Return the rotary table ``[cls_token_num + P, D', 2]`` of the coarse grid, from the model's own fine one.

    >>> from types import SimpleNamespace
    >>> import torch
    >>> model = SimpleNamespace(freqs_cis=torch.randn(1 + 256, 32, 2), cls_token_num=1, block_size=256)
    >>> coarse_rotary_table(model, 4).shape
    torch.Size([17, 32, 2])

    Position (y, x) of the coarse grid has the angles of position (y, x) of the fine one.

    Args:
        model: with ``freqs_cis``, ``cls_token_num`` and ``block_size``, as `apply`.
        patch: tokens of a patch along one side.

    Raises:
        ValueError: the patch does not divide the grid, or ``model.freqs_cis`` is not the table of the fine grid (the
            official forward puts the table of its last call there).
    """
    side, conditions = _side(model), cast(int, model.cls_token_num)
    table = cast(Tensor, model.freqs_cis)
    if patch < 1 or side % patch:
        raise ValueError(f"p: expected a patch that divides the grid of {side} by {side} tokens, got {patch}")
    _check_table("model.freqs_cis", table, conditions + side**2, 1)
    grid = table[conditions:].unflatten(0, (side, side))
    coarse = grid[: side // patch, : side // patch].flatten(0, 1)
    return torch.cat((table[:conditions], coarse))


def official_schedule(levels: int, epochs: int, steps_per_epoch: int, rate: float = 0.5) -> PatchSchedule:
    """Return the official training script's stages, which end with whole epochs.

    >>> official_schedule(levels=2, epochs=9, steps_per_epoch=10).boundaries
    ((2, 40), (1, 90))
    >>> PatchSchedule.coarse_to_fine(levels=2, total_steps=90).boundaries
    ((2, 45), (1, 90))

    Args:
        levels: ``--patch-level``, 1 to 4: the patches are the last of 8, 4, 2, 1.
        epochs: ``--epochs``.
        steps_per_epoch: ``int(len(dataset) / global_batch_size)``.
        rate: ``--epoch-rate``: stage i from the end, counted from 0, ends with epoch ``⌊rate^i · epochs⌋``. A stage
            without an epoch is left out, as there.

    Raises:
        ValueError: an argument is out of its range.
    """
    if not 1 <= levels <= 4:
        raise ValueError(f"levels: expected 1 to 4, got {levels}")
    for name, value in (("epochs", epochs), ("steps_per_epoch", steps_per_epoch)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not 0 < rate < 1:
        raise ValueError(f"rate: expected a number between 0 and 1, got {rate}")
    boundaries: list[tuple[int, int]] = []
    for level in reversed(range(levels)):
        until = int(epochs * rate**level) * steps_per_epoch
        if until > (boundaries[-1][1] if boundaries else 0):
            boundaries.append((2**level, until))
    return PatchSchedule(boundaries)


def apply(model: nn.Module, *, check: bool = True) -> PatchForward:
    """Give a LlamaGen or NPP `Transformer` a forward that trains on patches; return what undoes it.

    ::

        model = GPT_models["GPT-B"](vocab_size=16384, block_size=256)    # of LlamaGen, or of the official NPP code
        apply(model)
        _, loss = model(idx=tokens, cond_idx=labels, targets=tokens, p=4)

    The signature stays, and gets ``p`` and ``patch_size`` where it had none. With ``targets`` the forward returns
    ``(None, loss)``: the logits are what it never makes. Everything else (sampling with or without a cache, logits
    without targets) is the model's own forward. ``idx`` are all tokens, or all but the last.

    Apply it to the model itself, before `torch.compile` and `DistributedDataParallel`, and before FSDP shards it. A
    deep copy (the average of an EMA) has the same forward, on its own weights. ``undo()``, or leaving the ``with``,
    restores the model.

    - ``freqs_cis`` may be left out: the table of the coarse grid is made once from the model's own. One that is given
      has to be of that grid, and is best on the model's device already.
    - ``mask`` has to be of the coarse sequence, ``[..., S, S]`` with ``S = cls_token_num + P - 1``.
    - ``valid`` (0, 1 or between) weighs each image, at every patch.
    - In ``eval()`` the loss is the one of training without dropout: the official forward leaves the last group in, and
      has no loss there.
    - An embedding or output layer that does more than its weight says (an adapter, hooks, ``max_norm``) is called, in
      place of the operation on its weight: right, but its embeddings, or its logits for each patch, exist.

    Args:
        model: with the attributes of LlamaGen's `Transformer`, class- or text-conditional.
        check: compare the loss at patch 1 with the model's own forward, on one random image, so that a model that
            computes something else is refused. It takes two forward passes.

    Raises:
        TypeError: the model lacks what LlamaGen's has, or is wrapped.
        ValueError: its own loss is another one, or it has been applied to already. From the forward: a patch that does
            not divide the grid, a ``patch_size`` that is not ``p²``, a table or mask of another grid, a cache that is
            still there.
    """
    if wrapped := next((name for name in ("_orig_mod", "module") if hasattr(model, name)), None):
        raise TypeError(f"model: expected the model itself, got {type(model).__name__}: apply to model.{wrapped}")
    if missing := [name for name in _SURFACE if not hasattr(model, name)]:
        raise TypeError(f"model: expected LlamaGen's Transformer, got {type(model).__name__} without {missing[0]}")
    if isinstance(getattr(model.forward, "__self__", None), PatchForward):
        raise ValueError("model: expected one that this was not applied to, got one that it was: undo() first")
    patched = PatchForward(model)
    if check:
        _compare(patched)
    model.forward = patched.forward
    return patched


class PatchForward:
    """The forward that `apply` gives to a model, and the way back.

    It is an object and not a function, so that a copy of the model has a copy of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # The forward of the class, or one that somebody has put on the instance. NPP's takes p, LlamaGen's does not.
        self.previous: Callable[..., Any] | None = vars(model).get("forward")
        self.takes_patches = "p" in inspect.signature(model.forward).parameters
        side = _side(model)
        device = next(model.parameters()).device
        device = torch.device("cpu") if device.type == "meta" else device  # the tables move with the model later
        patches = [patch for patch in range(1, side + 1) if side % patch == 0]
        self.tables = {patch: coarse_rotary_table(model, patch).to(device) for patch in patches}

    def undo(self) -> None:
        """Restore the model's own forward."""
        del self.model.forward
        if self.previous is not None:
            self.model.forward = self.previous

    def __enter__(self) -> PatchForward:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def original(self, *arguments: Any, **options: Any) -> Any:
        """Call the model's own forward."""
        if self.previous is not None:
            return self.previous(*arguments, **options)
        return type(self.model).forward(self.model, *arguments, **options)

    def forward(
        self,
        idx: Tensor | None,
        cond_idx: Tensor | None,
        input_pos: Tensor | None = None,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        valid: Tensor | None = None,
        p: int = 1,
        patch_size: int | None = None,
        freqs_cis: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return ``(None, loss)`` of a batch with targets; else what the model's own forward returns."""
        if patch_size is not None and patch_size != p**2:
            raise ValueError(f"patch_size: expected p² = {p**2}, got {patch_size}")
        if idx is None or cond_idx is None or targets is None:
            options = {"p": p, "patch_size": p**2, "freqs_cis": freqs_cis} if self.takes_patches else {}
            if p != 1 and not self.takes_patches:
                raise ValueError(f"p: expected 1 without targets, since this model's own forward takes none, got {p}")
            theirs: tuple[Tensor | None, Tensor | None]
            theirs = self.original(idx, cond_idx, input_pos, targets, mask, valid, **options)
            return theirs
        model, side = cast(Any, self.model), _side(self.model)
        if p not in self.tables:
            raise ValueError(f"p: expected a patch that divides the grid of {side} by {side} tokens, got {p}")
        if any(getattr(layer.attention, "kv_cache", None) is not None for layer in model.layers):
            raise ValueError("model: expected no cache beside targets, got one: set layer.attention.kv_cache = None")

        condition = model.cls_embedding(cond_idx, train=model.training)[:, : model.cls_token_num]
        h = model.tok_dropout(torch.cat((condition, self._inputs(idx, p)), dim=1))
        length, num_patches = h.shape[1], (side // p) ** 2
        if mask is not None and mask.shape[-1] != length:
            raise ValueError(
                f"mask: expected [..., {length}, {length}] for patch {p}, got {tuple(mask.shape)}: one that is causal "
                "over the image can be cut, mask[..., :S, :S]"
            )
        table = self._table(p, freqs_cis, h.device, model.cls_token_num + num_patches)
        table = table[:length] if model.training or input_pos is None else table[input_pos]
        for layer in model.layers:
            h = layer(h, table, input_pos, mask)
        h = model.norm(h)[:, model.cls_token_num - 1 :]
        groups = group_tokens(targets, p, grid=(side, side))
        if valid is None:
            return None, patch_loss(h, model.output, groups)
        losses = cast(Tensor, _loss(h, model.output, groups, reduction="none"))
        weights = valid.to(losses.dtype)[:, None, None].expand_as(losses)
        return None, (losses * weights).sum() / weights.sum().clamp(min=1)

    def _inputs(self, idx: Tensor, p: int) -> Tensor:
        """Return the inputs after the condition: all groups but the last, which needs no token of its own."""
        side, embedding = _side(self.model), cast(nn.Module, self.model.tok_embeddings)
        if idx.shape[1] not in (side**2, side**2 - 1):
            raise ValueError(f"idx: expected {side**2} tokens of an image, or all but the last, got {idx.shape[1]}")
        is_plain = embedding_difference(embedding) is None
        if p == 1 and not is_plain:
            return cast(Tensor, embedding(idx))[:, : side**2 - 1]
        idx = F.pad(idx, (0, side**2 - idx.shape[1]))  # the pad's group is no input
        if is_plain:
            return patch_inputs(embedding, group_tokens(idx, p, grid=(side, side)))
        return patch_mean(embedding(idx), p, grid=(side, side))[:, :-1]

    def _table(self, p: int, given: Tensor | None, device: torch.device, rows: int) -> Tensor:
        if given is not None:
            _check_table("freqs_cis", given, rows, p)
            return given.to(device)
        if self.tables[p].device != device:
            self.tables[p] = self.tables[p].to(device)  # the model was moved meanwhile
        return self.tables[p]


def _loss(hidden: Tensor, output: nn.Module, groups: Tensor, **options: Any) -> Any:
    if linear_difference(output) is not None:
        return patch_cross_entropy(output(hidden), groups, **options)
    weight, bias = plain_linear(output)
    return linear_patch_cross_entropy(hidden, weight, groups, bias=bias, **options)


def _side(model: nn.Module) -> int:
    return math.isqrt(cast(int, model.block_size))


def _check_table(name: str, table: Tensor, rows: int, patch: int) -> None:
    if table.shape[0] != rows:
        raise ValueError(
            f"{name}: expected the {rows} rows of the condition and the grid at patch {patch}, got {table.shape[0]}"
        )


@torch.no_grad()
def _compare(patched: PatchForward) -> None:
    """Raise unless the model's own loss of one random image, at patch 1, is ours."""
    model = cast(Any, patched.model)
    weights = [weight for weight in model.output.parameters() if weight.is_floating_point()]
    device, dtype = model.tok_embeddings.weight.device, model.tok_embeddings.weight.dtype
    if device.type == "meta":
        raise ValueError("model: expected weights to compare with, got a model on meta: apply(model, check=False)")
    was_training, table = model.training, model.freqs_cis
    before = [weight.clone() for weight in weights]
    # Autocast caches casts of the weights, which are exchanged here.
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.autocast(device.type, enabled=False):
        torch.manual_seed(0)
        for weight in weights:  # the official code starts it at zero, where any formula gives the same loss
            weight.normal_(std=2 / math.sqrt(weight.shape[-1]))
        tokens = torch.randint(model.tok_embeddings.weight.shape[0], (1, model.block_size), device=device)
        caption = getattr(model.cls_embedding, "uncond_embedding", None)  # only in a model that is conditioned on text
        condition = torch.zeros(1, dtype=torch.int64, device=device) if caption is None else caption[None]
        options: dict[str, Any] = {}
        if patched.takes_patches:
            options = {"p": 1, "patch_size": 1, "freqs_cis": patched.tables[1]}
        forwards: tuple[Callable[..., Any], ...] = (patched.original, patched.forward)
        inputs = tokens if patched.takes_patches else tokens[:, :-1]
        losses = []
        model.training = True  # only the flag of the whole model, which decides what happens to the tokens
        try:
            for forward in forwards:
                torch.manual_seed(1)  # so that both draw the same dropout
                losses.append(forward(idx=inputs, cond_idx=condition, targets=tokens, **options)[1].item())
        finally:
            model.training, model.freqs_cis = was_training, table
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 2e-2
    if not abs(losses[0] - losses[1]) <= tolerance * abs(losses[0]):
        raise ValueError(
            f"model: expected the loss of LlamaGen's forward at patch 1, {losses[1]:.5f} on a random image, got "
            f"{losses[0]:.5f} from its own: it computes something else"
        )
