"""How a causal language model's loss on patches is to be formed, found by running the model, not by its name.

Two sequences of random ids go through the model's own forward and through the patched one with patches of one token.
The first formulation whose logits and loss agree is taken; a model for which none does is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npp_kernels.integrations._layers import linear_difference

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma; RecurrentGemma; xLSTM
INPUT_SCALES = ("embedding_multiplier", "embed_scale")  # FalconH1 and others: the model scales after the look-up
BATCH, LENGTH = 2, 32
# As a share of the logits' spread: rounding stays far below this, and a head with arithmetic of its own far above.
LOGIT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Formulation:
    """Where the loss is formed, and from what.

    Args:
        fused: the loss applies the head itself, so that the logits never exist; else it takes the model's own logits.
        inside: the model calls its ``loss_function``, and adds to it what it adds (the auxiliary loss of experts).
        softcap: of the logits, where the loss applies it in the model's place.
        input_scale: what the model multiplies embeddings by when it looks them up itself.
        reason: why the logits are not fused; empty where they are.
    """

    fused: bool
    inside: bool
    softcap: float | None = None
    input_scale: float = 1.0
    reason: str = ""


class UnsupportedModelError(ValueError):
    """A model whose own loss the patched forward could not be shown to give with patches of one token."""


def examine(patched: Any) -> Formulation:
    """Return the formulation that gives the model's own loss, or raise `UnsupportedModelError`.

    Args:
        patched: a `npp_kernels.integrations.transformers.Patched`, with the model's forward still in place.
    """
    model, name = patched.model, type(patched.model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"model: expected a decoder alone, got {name}, which has an encoder")
    for argument in ("inputs_embeds", "labels"):
        if argument not in patched.names:
            raise UnsupportedModelError(f"model: expected a forward that takes {argument}, got that of {name}")
    inputs = _random_batch(model)
    with torch.no_grad(), _kept_state(model), _stirred(model.get_output_embeddings()):
        try:
            with torch.enable_grad():
                own = _seeded(patched.run_own, inputs)
        except Exception as error:
            raise UnsupportedModelError(
                f"model: expected {name} to run on input_ids [{BATCH}, {LENGTH}] and labels alone, got {error!r}"
            ) from error
        if getattr(own, "loss", None) is None or getattr(own, "logits", None) is None:
            raise UnsupportedModelError(f"model: expected {name} to return a loss and logits, got {type(own).__name__}")
        _check_causal(patched, inputs, own.logits)
        plain = _find_plain(patched, inputs, own)
        return _find_fused(patched, inputs, own, plain)


def _find_plain(patched: Any, inputs: dict[str, Tensor], own: Any) -> Formulation:
    """Return the formulation on the model's own logits."""
    name, failures = type(patched.model).__name__, []
    scales = [1.0, *_numbers(patched.model, INPUT_SCALES)]
    for inside in (True, False):
        for scale in scales:
            formulation = Formulation(False, inside, input_scale=scale)
            try:
                with torch.enable_grad():
                    outputs, _ = _seeded(patched.run_patched, inputs, 1, formulation)
            except Exception as error:  # the model's code, on inputs that it was not written for
                failures.append(repr(error))
                continue
            if not _same_logits(outputs.logits, own.logits):
                failures.append("inputs_embeds give other logits than input_ids do")
            elif not _same_loss(outputs.loss, own.loss, own.logits):
                losses = own.loss.item(), outputs.loss.item()
                failures.append("the model's own loss is {:.6f}, that of its next tokens {:.6f}".format(*losses))
            elif missing := _missing_gradients(patched.model, own.loss, outputs.loss):
                failures.append(f"inputs_embeds leave {', '.join(missing)} without gradient")
            elif refusal := _error_on_patches(patched, inputs, formulation):
                failures.append(f"its forward refuses means of embeddings: {refusal}")
            else:
                return formulation
    reasons = "; ".join(dict.fromkeys(failures))
    raise UnsupportedModelError(f"model: expected the loss of {name} to be that of its next tokens, but {reasons}")


def _missing_gradients(model: nn.Module, own: Tensor, ours: Tensor) -> list[str]:
    missing = _reached(own) - _reached(ours)
    return [name for name, parameter in model.named_parameters() if parameter in missing]


def _reached(loss: Tensor) -> set[Tensor]:
    """Return the leaves that a loss's gradient reaches.

    What is multiplied by zeros, as much is when training begins, shows in no logit and has a gradient all the same.
    """
    found, seen, left = set(), set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        left += [following for following, _ in node.next_functions]
    return found


def _error_on_patches(patched: Any, inputs: dict[str, Tensor], formulation: Formulation) -> str | None:
    """Return what a forward on patches of two raises: a model may look up which tokens its embeddings are of."""
    try:
        _seeded(patched.run_patched, inputs, 2, formulation)
    except Exception as error:
        return repr(error)
    return None


def _find_fused(patched: Any, inputs: dict[str, Tensor], own: Any, plain: Formulation) -> Formulation:
    """Return the formulation in which the loss applies the head, or ``plain`` and the reason."""
    head = patched.model.get_output_embeddings()
    difference = "no output embeddings" if head is None else linear_difference(head)
    if difference:
        return replace(plain, reason=f"the head is {difference}")
    patched.take_head(head)
    for softcap in (None, *_numbers(patched.model, SOFTCAPS)):
        formulation = replace(plain, fused=True, softcap=softcap)
        try:
            _, hidden = _seeded(patched.run_patched, inputs, 1, formulation)
            logits = F.linear(hidden.to(head.weight.dtype), head.weight, head.bias)
        except Exception:  # arithmetic after the head needs the whole vocabulary: use the model's own logits
            continue
        if softcap is not None:
            logits = softcap * torch.tanh(logits.float() / softcap)
        if _same_logits(logits, own.logits):
            return formulation
    patched.release_head()
    return replace(plain, reason="the logits are not hidden · Wᵀ + b, nor a known function of it")


def _check_causal(patched: Any, inputs: dict[str, Tensor], logits: Tensor) -> None:
    """Raise where what comes later changes what is predicted before it: targets would leak."""
    changed = inputs["input_ids"].clone()
    changed[:, -1] = inputs["input_ids"][:, 0]
    other = _seeded(patched.run_own, {**inputs, "input_ids": changed}).logits
    if not _same_logits(other[:, :-1], logits[:, :-1]):
        raise UnsupportedModelError(
            f"model: expected each position of {type(patched.model).__name__} to see those before it alone, got logits "
            "that depend on later tokens"
        )


def _same_logits(ours: Any, own: Tensor) -> bool:
    if not isinstance(ours, Tensor) or ours.shape != own.shape:
        return False
    tolerance = LOGIT_TOLERANCE[own.dtype if own.dtype in LOGIT_TOLERANCE else torch.float32]
    tolerance = max(tolerance, LOGIT_TOLERANCE.get(ours.dtype, 0.0))
    ours, own = ours.double(), own.double()
    spread = (own - own.mean(-1, keepdim=True)).norm()
    return bool((ours - own).norm() <= tolerance * spread)


def _same_loss(ours: Tensor, own: Tensor, logits: Tensor) -> bool:
    """Compare losses of the same logits: what is left is rounding in the loss's dtype."""
    spread = logits.double().std().item()
    tolerance = 4 * torch.finfo(own.dtype).eps * own.abs().item() + 1e-3 * spread
    return abs(ours.item() - own.item()) <= tolerance + 1e-6 * abs(own.item())


def _numbers(model: nn.Module, names: tuple[str, ...]) -> Iterator[float]:
    """Yield each number that the model's configuration or one of its modules keeps under one of these names."""
    config: Any = model.config
    homes = [config, *([config.get_text_config()] if hasattr(config, "get_text_config") else []), *model.modules()]
    seen = {1.0}
    for home in homes:
        for name in names:
            value = getattr(home, name, None)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value not in seen:
                seen.add(value)
                yield float(value)


def _random_batch(model: Any) -> dict[str, Tensor]:
    """Return ids that stand for nothing special, and labels of which some do not count."""
    embedding = model.get_input_embeddings()
    size = getattr(model.config.get_text_config(), "vocab_size", None) or embedding.num_embeddings
    special = set()
    for config in (model.config, model.config.get_text_config()):
        for name, value in config.to_dict().items():
            if name.endswith(("_token_id", "_token_index")):
                special |= set(value) if isinstance(value, (list, tuple)) else {value}
    usable = [token for token in range(min(size, 4096)) if token not in special]
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor(usable)[torch.randint(len(usable), (BATCH, LENGTH), generator=generator)]
    device = next(model.parameters()).device
    labels = ids.clone()
    labels[0, LENGTH // 2 : LENGTH // 2 + 3] = -100
    labels[1, -5:] = -100
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def _seeded(run: Any, *arguments: Any) -> Any:
    """Run from one seed, so that dropout takes the same elements each time."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        return run(*arguments)


@contextmanager
def _kept_state(model: nn.Module) -> Iterator[None]:
    """Run in training mode, as the loss will; put modes and buffers back afterwards."""
    modes = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    model.train()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for buffer, value in buffers.items():
            if not torch.equal(buffer, value):  # an earlier autograd graph may hold buffers that did not change
                buffer.copy_(value)


@contextmanager
def _stirred(head: nn.Module | None) -> Iterator[None]:
    """Fill an output layer of zeros with random numbers for a while: of equal logits nothing can be told."""
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point() or weight.any():
        yield
        return
    generator = torch.Generator().manual_seed(0)
    weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5)
    try:
        yield
    finally:
        weight.zero_()


def parameter_names(forward: Any) -> list[str]:
    """Return the names of a forward's arguments, in order, those of ``**kwargs`` left out."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [name for name, value in inspect.signature(forward).parameters.items() if value.kind not in kinds]


def has_options(forward: Any) -> bool:
    """Return whether a forward takes ``**kwargs``."""
    parameters = inspect.signature(forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
